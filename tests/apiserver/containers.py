"""The containers of the fake kubelet: real supervisors, what is told of them, and how they come to end."""

import asyncio
import base64
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from mlx_operator.act.kube import Kube
from mlx_operator.act.resources import PODS, SECRETS, Resource
from mlx_operator_api import names
from mlx_operator_api.sizes import quantity
from tests.apiserver.pod_process import (
    ENGINE,
    Container,
    children_of,
    is_engine,
    now,
    persist,
    python_path,
    write_model,
)
from tests.apiserver.supervisor import CGROUP

_PROBE_SECONDS = 0.1
_RESTART_SECONDS = 0.3


class Containers:
    """Runs one container a pod. What a test wants of it are attributes and methods."""

    def __init__(self, kube: Kube, folder: Path) -> None:
        self._kube = kube
        self.folder = folder
        self.containers: dict[str, Container] = {}
        self.held: set[str] = set()
        """Names of pods that are placed but whose container is not started (an image that cannot be pulled)."""
        self.why: dict[str, tuple[str, str]] = {}
        """Reason and message of the kubelet for the pods that are held."""
        self.crashed: dict[str, dict[str, Any]] = {}
        """How a container of these pods ended before, by name; as the kubelet tells it."""
        self.unready: set[str] = set()
        """Names of pods that cannot be reached by readiness probes."""
        self.silent: dict[str, asyncio.Event] = {}
        """By pod, until when nothing is told of it: its node's kubelet is slow."""
        self.engine_plan = folder / "engine-plan.json"
        write_model(folder / "models" / "tiny")

    def of(self, name: str) -> Container:
        """The container of a pod by name."""
        return next(c for c in self.containers.values() if c.name == name)

    def kill(self, name: str, *, engine: bool = True, reason: str = "") -> None:
        """SIGKILL a pod's supervisor, and by default its engine with it; `reason` is the kubelet's word: OOMKilled."""
        self.of(name).reason = reason
        process = self.of(name).process
        assert process is not None
        children = children_of(process.pid) if engine else []
        # The supervisor first: it must not live to tell of its engine.
        for pid in [process.pid, *children]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_engine(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signal the engine that a pod's supervisor uses (the oldest child); returns its pid."""
        process = self.of(name).process
        assert process is not None
        pid = children_of(process.pid)[0]
        os.kill(pid, number)
        return pid

    def engines(self, container: Container) -> list[int]:
        """The engines that a container's supervisor has begun to use and that are not dead; no spares."""
        process = container.process
        children = children_of(process.pid) if process is not None and process.returncode is None else []
        return [pid for pid in children if is_engine(pid)]

    def oom(self, name: str) -> None:
        """Kill that engine as the kernel does where only the process is ended, not its cgroup."""
        (self._cgroup(self.of(name)) / "memory.events").write_text("oom 1\noom_kill 1\n")
        self.kill_engine(name)

    def plan(self, **what: Any) -> None:
        """What engines and supervisors do from now on; nothing: as they should."""
        fresh = self.engine_plan.with_suffix(".new")
        fresh.write_text(json.dumps(what))
        os.replace(fresh, self.engine_plan)

    def report(self, name: str) -> dict[str, Any]:
        """The last report that a pod's supervisor wrote to its state; empty before the first."""
        try:
            found: dict[str, Any] = json.loads((self._state(self.of(name)) / "report.json").read_text())
        except (FileNotFoundError, StopIteration):
            return {}
        return found

    def _state(self, container: Container) -> Path:
        return self.folder / "state" / container.uid

    def _cgroup(self, container: Container) -> Path:
        return self.folder / "cgroup" / container.uid

    # -- one pod
    async def _bind(self, container: Container) -> None:
        if not container.manifest["spec"].get("nodeName"):
            target = {"apiVersion": "v1", "kind": "Node", "name": container.node}
            body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": container.name}, "target": target}
            path = Resource("", "v1", f"pods/{container.name}/binding", "Binding")
            await persist(lambda: self._kube.create(path, container.namespace, body))

    async def _live(self, container: Container) -> None:
        await self._bind(container)
        while container.name in self.held:
            if container.ended is None and container.name in self.crashed:
                before = self.crashed[container.name] | {"finishedAt": now()}
                container.ended, container.restarts = {"terminated": before}, 2
            reason, message = self.why.get(container.name, ("ImagePullBackOff", "no such image"))
            await self._report(container, {"waiting": {"reason": reason, "message": message}})
            await asyncio.sleep(0.2)
        while True:
            environment = await self._environment(container)
            log = (self.folder / f"{container.name}.log").open("ab")
            container.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.apiserver.supervisor",
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            log.close()
            container.started = now()
            await self._report(container, {"running": {"startedAt": container.started}})
            probe = asyncio.create_task(self._probe(container), name="probe")
            try:
                code = await container.process.wait()
            finally:
                probe.cancel()
            container.ready = False
            if container.over:
                return
            ended: dict[str, Any] = {"startedAt": container.started, "finishedAt": now()}
            ended |= {"exitCode": code if code >= 0 else 128 - code, "reason": "Error" if code else "Completed"}
            if container.reason:
                ended["reason"], container.reason = container.reason, ""
            container.ended = {"terminated": ended}
            await self._report(container, {"terminated": ended})
            await asyncio.sleep(_RESTART_SECONDS)
            container.restarts += 1

    async def _environment(self, container: Container) -> dict[str, str]:
        spec = container.manifest["spec"]
        values = {"metadata.name": container.name, "metadata.uid": container.uid}
        values |= {"status.podIP": container.ip, "spec.nodeName": container.node}
        environment = dict(os.environ)
        for variable in spec["containers"][0]["env"]:
            source = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            environment[variable["name"]] = values[source] if source else variable.get("value", "")
        state, cgroup = self._state(container), self._cgroup(container)
        state.mkdir(parents=True, exist_ok=True)
        cgroup.mkdir(parents=True, exist_ok=True)
        limit = spec["containers"][0].get("resources", {}).get("limits", {}).get("memory")
        if limit is not None:
            (cgroup / "memory.max").write_text(str(quantity(limit)))
        token = state / "token"
        if not token.exists():
            volume = next(volume for volume in spec["volumes"] if "secret" in volume)
            name = volume["secret"]["secretName"]
            secret = await persist(lambda: self._kube.get(SECRETS, container.namespace, name))
            assert secret is not None, f"Secret {name} is created before its pods"
            token.write_bytes(base64.b64decode(secret["data"][names.TOKEN_KEY]))
        environment |= {
            names.ENV_LISTEN_HOST: container.ip,
            names.ENV_TOKEN_FILE: str(token),
            names.ENV_STATE_DIR: str(state),
            names.ENV_MODEL_DIR: str(self.folder / "models"),
            names.ENV_CACHE_DIR: str(state),
            "MLX_RUNNER_ENGINE": f"{sys.executable} {ENGINE}",
            "FAKE_ENGINE_PLAN": str(self.engine_plan),
            "PYTHONPATH": python_path(),
            CGROUP: str(cgroup),
        }
        return environment

    async def _probe(self, container: Container) -> None:
        url = f"http://{container.ip}:{names.CONTROL_PORT}/readyz"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                try:
                    async with session.get(url) as answer:
                        ready = answer.status == 200 and container.name not in self.unready
                except (aiohttp.ClientError, OSError, TimeoutError):
                    ready = False
                if ready != container.ready:
                    container.ready = ready
                    await self._report(container, {"running": {"startedAt": container.started}})
                await asyncio.sleep(_PROBE_SECONDS)

    async def _terminate(self, container: Container) -> None:
        await self._end(container, kill=False)
        await self._delete(container.namespace, container.name, container.uid)

    async def _end(self, container: Container, *, kill: bool) -> None:
        self.containers.pop(container.uid, None)
        process = container.process
        mine = asyncio.current_task()
        for task in container.tasks:
            if task is not mine:
                task.cancel()
        if process is None or process.returncode is not None:
            return
        children = children_of(process.pid)
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), 35)
        except TimeoutError:
            process.kill()
            await process.wait()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    async def evict(self, name: str, message: str) -> None:
        """Say of a pod that it was ended for its node's sake, once its container is: it stays, Failed."""
        container = self.of(name)
        target = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": message}
        pod = await self._kube.get(PODS, container.namespace, name)
        conditions = [*pod["status"]["conditions"], target | {"lastTransitionTime": now()}]
        body = {"phase": "Failed", "reason": "Evicted", "message": message, "conditions": conditions}
        await persist(
            lambda: self._kube.merge_patch(PODS, container.namespace, name, {"status": body}, subresource="status")
        )

    async def disrupt(self, name: str, reason: str, message: str) -> None:
        """Announce the end of a pod, then delete it, as the scheduler and the controllers do."""
        container = self.of(name)
        target = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
        container.conditions = [target | {"lastTransitionTime": now()}]
        await self._report(container, {"running": {"startedAt": container.started}})
        await self._kube.delete(PODS, container.namespace, name, uid=container.uid)

    def _conditions(self, container: Container, ready: str) -> list[dict[str, Any]]:
        found = list(container.conditions)
        for kind, status in (("PodScheduled", "True"), ("ContainersReady", ready), ("Ready", ready)):
            known = container.changed.get(kind)
            if known is None or known[0] != status:
                container.changed[kind] = (status, now())
            entry = {"type": kind, "status": status, "lastTransitionTime": container.changed[kind][1]}
            if status == "False":
                words = f"containers with unready status: [{names.CONTAINER}]"
                entry |= {"reason": "ContainersNotReady", "message": words}
            found.append(entry)
        return found

    async def _report(self, container: Container, state: dict[str, Any]) -> None:
        if container.name in self.silent:
            await self.silent[container.name].wait()
        if container.over:
            return
        ready = "True" if container.ready else "False"
        status: dict[str, Any] = {"name": names.CONTAINER, "ready": container.ready, "state": state, "image": "fake"}
        status |= {"restartCount": container.restarts, "imageID": "fake", "started": "running" in state}
        if container.ended is not None and "terminated" not in state:
            status["lastState"] = container.ended
        runs = "running" in state or "terminated" in state
        body: dict[str, Any] = {
            "phase": "Running" if runs else "Pending",
            "podIP": container.ip,
            "podIPs": [{"ip": container.ip}],
            "hostIP": "127.0.0.1",
            "hostIPs": [{"ip": "127.0.0.1"}],
            "containerStatuses": [status],
            "conditions": self._conditions(container, ready),
        }
        if not runs:
            del body["podIP"], body["podIPs"]
        await persist(
            lambda: self._kube.merge_patch(
                PODS, container.namespace, container.name, {"status": body}, subresource="status"
            )
        )

    async def _delete(self, namespace: str, name: str, uid: str) -> None:
        await persist(lambda: self._kube.delete(PODS, namespace, name, uid=uid, grace_seconds=0))
