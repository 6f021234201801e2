"""A kubelet and a scheduler without a node: pods get a loopback address and a real supervisor process.

The supervisors are the runner image's own, with `tests/runner/fake_engine.py` as their engine, so that the protocol,
the reports and the ways to die are the real ones. Each pod has an address of 127.0.0.0/8 and a cgroup to itself; that
is a folder, in which a test plays the kernel.
"""

import asyncio
import base64
import json
import os
import random
import signal
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import NODES, PODS, SECRETS, Resource
from mlx_operator_api import names
from mlx_operator_api.sizes import quantity
from mlx_runner import channel
from tests.apiserver.supervisor import CGROUP

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "tests" / "runner" / "fake_engine.py"
PACKAGES = ("api", "operator", "runner_image", ".")
NODE_NAMES = ("n1", "n2")
_PROBE_SECONDS = 0.1
_RESTART_SECONDS = 0.3


def python_path() -> str:
    """What a child process needs to import the project."""
    return os.pathsep.join(str(ROOT / package) for package in PACKAGES)


def write_model(folder: Path) -> None:
    """A model directory that passes verification and that no engine here reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 4}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


@dataclass
class Container:
    """The runner of one pod."""

    uid: str
    namespace: str
    name: str
    ip: str
    node: str
    manifest: dict[str, Any]
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    started: str = ""
    ended: dict[str, Any] | None = None
    ready: bool = False
    reason: str = ""
    """Why its process ended, where the kubelet knows more than an exit code: OOMKilled."""
    conditions: list[dict[str, Any]] = field(default_factory=list)
    """Of the pod, besides those that are always there."""
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Status and time of its last change, by type of condition."""
    over: bool = False
    """The pod failed for good: nothing is reported of it any more."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Kubelet:
    """Runs the pods of all ModelInstances of one namespace; an async context manager.

    Args:
        kube: as the kubelet.
        session: authenticated, for the watch.
        server: URL of the API server.
        namespace: whose pods are run.
        folder: for state, tokens, logs and the model.
    """

    def __init__(self, kube: Kube, session: aiohttp.ClientSession, server: str, namespace: str, folder: Path) -> None:
        self._kube = kube
        self._namespace = namespace
        self._session = session
        self._server = server
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
        self.unplaceable = ""
        """The scheduler's words about all pods that have no node yet; empty: they get one."""
        self.engine_plan = folder / "engine-plan.json"
        self._subnet = "127." + ".".join(str(random.randint(2, 250)) for _ in range(2))  # noqa: S311 (no secret)
        self._next = 1
        self._watch: asyncio.Task[None] | None = None
        write_model(folder / "models" / "tiny")

    async def __aenter__(self) -> "Kubelet":
        for name in NODE_NAMES:
            await self.set_node(name, ready=True)
        self._watch = asyncio.create_task(self._follow(), name="kubelet")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._watch is not None
        self._watch.cancel()
        for container in list(self.containers.values()):
            await self._end(container, kill=True)
        await asyncio.gather(self._watch, return_exceptions=True)

    async def set_node(self, name: str, *, ready: bool) -> None:
        """Create a node, or change its Ready condition."""
        with suppress(KubeError):
            await self._kube.create(NODES, None, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        condition = {"type": "Ready", "status": "True" if ready else "Unknown", "lastTransitionTime": _now()}
        condition |= {"reason": "KubeletReady" if ready else "NodeStatusUnknown", "message": ""}
        body = {"status": {"conditions": [condition]}}
        await self._kube.merge_patch(NODES, None, name, body, subresource="status")

    def of(self, name: str) -> Container:
        """The container of a pod by name."""
        return next(c for c in self.containers.values() if c.name == name)

    def kill(self, name: str, *, engine: bool = True, reason: str = "") -> None:
        """SIGKILL a pod's supervisor, and by default its engine with it; `reason` is the kubelet's word: OOMKilled."""
        self.of(name).reason = reason
        process = self.of(name).process
        assert process is not None
        children = _children(process.pid) if engine else []
        # The supervisor first: it must not live to tell of its engine.
        for pid in [process.pid, *children]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_engine(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signal the engine that a pod's supervisor uses (the oldest child); returns its pid."""
        process = self.of(name).process
        assert process is not None
        pid = min(_children(process.pid))
        os.kill(pid, number)
        return pid

    def engines(self, container: Container) -> list[int]:
        """The engines that a container's supervisor has begun to use and that are not dead; no spares."""
        process = container.process
        children = _children(process.pid) if process is not None and process.returncode is None else []
        return [pid for pid in children if _is_engine(pid)]

    def places(self, pod: dict[str, Any]) -> bool:
        """Whether there is a node for a pod."""
        return "nodeSelector" not in pod["spec"]

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

    # -- the watch
    async def _follow(self) -> None:
        while True:
            try:
                items, version = await self._kube.list(PODS, self._namespace, labels=names.INSTANCE_LABEL)
                present = {item["metadata"]["uid"] for item in items}
                for item in items:
                    await self._seen(item)
                for uid in [uid for uid in self.containers if uid not in present]:
                    await self._end(self.containers[uid], kill=True)
                async for kind, item in self._events(version):
                    if kind == "DELETED":
                        gone = self.containers.get(item["metadata"]["uid"])
                        if gone is not None:
                            await self._end(gone, kill=True)
                    elif kind in ("ADDED", "MODIFIED"):
                        await self._seen(item)
            except (KubeError, aiohttp.ClientError, OSError, TimeoutError, ValueError):  # also an event that breaks off
                await asyncio.sleep(0.2)

    async def _events(self, version: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        query = {"watch": "1", "labelSelector": names.INSTANCE_LABEL, "resourceVersion": version}
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(
            self._server + PODS.path(self._namespace), params=query, timeout=timeout
        ) as answer:
            async for line in answer.content:
                event = json.loads(line)
                yield event["type"], event["object"]

    async def _seen(self, pod: dict[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        container = self.containers.get(uid)
        if pod["metadata"].get("deletionTimestamp"):
            if container is None:
                await self._delete(pod["metadata"]["namespace"], pod["metadata"]["name"], uid)
            elif not any(task.get_name() == "terminate" for task in container.tasks):
                container.tasks.append(asyncio.create_task(self._terminate(container), name="terminate"))
        elif container is None and self.unplaceable and not pod["spec"].get("nodeName"):
            await self._not_placed(pod)
        elif container is None and self.places(pod):
            await self._place(pod)

    async def _not_placed(self, pod: dict[str, Any]) -> None:
        """As the scheduler says it: a condition, and nothing while that is the same."""
        words = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": self.unplaceable}
        known: dict[str, Any] = next(
            (c for c in pod["status"].get("conditions", ()) if c["type"] == "PodScheduled"), {}
        )
        if known.get("message") == self.unplaceable:
            return
        body = {"status": {"conditions": [words | {"lastTransitionTime": _now()}]}}
        metadata = pod["metadata"]
        await _persist(
            lambda: self._kube.merge_patch(PODS, metadata["namespace"], metadata["name"], body, subresource="status")
        )

    async def place_all(self) -> None:
        """Nodes have room again."""
        self.unplaceable = ""
        for pod in (await self._kube.list(PODS, self._namespace, labels=names.INSTANCE_LABEL))[0]:
            await self._seen(pod)

    async def _place(self, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        rank = int(metadata["labels"][names.RANK_LABEL])
        node = pod["spec"].get("nodeName") or NODE_NAMES[rank % len(NODE_NAMES)]
        ip = f"{self._subnet}.{self._next}"
        self._next += 1
        container = Container(metadata["uid"], metadata["namespace"], metadata["name"], ip, node, pod)
        self.containers[container.uid] = container
        container.tasks.append(asyncio.create_task(self._live(container), name="live"))

    # -- one pod
    async def _bind(self, container: Container) -> None:
        if not container.manifest["spec"].get("nodeName"):
            target = {"apiVersion": "v1", "kind": "Node", "name": container.node}
            body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": container.name}, "target": target}
            path = Resource("", "v1", f"pods/{container.name}/binding", "Binding")
            await _persist(lambda: self._kube.create(path, container.namespace, body))

    async def _live(self, container: Container) -> None:
        await self._bind(container)
        while container.name in self.held:
            if container.ended is None and container.name in self.crashed:
                before = self.crashed[container.name] | {"finishedAt": _now()}
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
            container.started = _now()
            await self._report(container, {"running": {"startedAt": container.started}})
            probe = asyncio.create_task(self._probe(container), name="probe")
            try:
                code = await container.process.wait()
            finally:
                probe.cancel()
            container.ready = False
            if container.over:
                return
            ended: dict[str, Any] = {"startedAt": container.started, "finishedAt": _now()}
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
            secret = await _persist(lambda: self._kube.get(SECRETS, container.namespace, name))
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
        children = _children(process.pid)
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
        conditions = [*pod["status"]["conditions"], target | {"lastTransitionTime": _now()}]
        body = {"phase": "Failed", "reason": "Evicted", "message": message, "conditions": conditions}
        await _persist(
            lambda: self._kube.merge_patch(PODS, container.namespace, name, {"status": body}, subresource="status")
        )

    async def disrupt(self, name: str, reason: str, message: str) -> None:
        """Announce the end of a pod, then delete it, as the scheduler and the controllers do."""
        container = self.of(name)
        target = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
        container.conditions = [target | {"lastTransitionTime": _now()}]
        await self._report(container, {"running": {"startedAt": container.started}})
        await self._kube.delete(PODS, container.namespace, name, uid=container.uid)

    def _conditions(self, container: Container, ready: str) -> list[dict[str, Any]]:
        found = list(container.conditions)
        for kind, status in (("PodScheduled", "True"), ("ContainersReady", ready), ("Ready", ready)):
            known = container.changed.get(kind)
            if known is None or known[0] != status:
                container.changed[kind] = (status, _now())
            entry = {"type": kind, "status": status, "lastTransitionTime": container.changed[kind][1]}
            if status == "False":
                words = f"containers with unready status: [{names.CONTAINER}]"
                entry |= {"reason": "ContainersNotReady", "message": words}
            found.append(entry)
        return found

    async def _report(self, container: Container, state: dict[str, Any]) -> None:
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
        await _persist(
            lambda: self._kube.merge_patch(
                PODS, container.namespace, container.name, {"status": body}, subresource="status"
            )
        )

    async def _delete(self, namespace: str, name: str, uid: str) -> None:
        await _persist(lambda: self._kube.delete(PODS, namespace, name, uid=uid, grace_seconds=0))


async def _persist(request: Callable[[], Awaitable[Any]]) -> Any:
    """A kubelet repeats what the API server did not take, also over a long outage; None for what is gone."""
    for _ in range(3000):
        try:
            return await request()
        except KubeError as error:
            if not error.transient:
                return None
            await asyncio.sleep(0.1)
    raise AssertionError("the API server took nothing for 5 minutes")


def _children(pid: int) -> list[int]:
    def found() -> Iterator[int]:
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from (int(child) for child in (task / "children").read_text().split())

    try:
        return sorted(found())
    except (FileNotFoundError, ProcessLookupError):
        return []


def _is_engine(pid: int) -> bool:
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return name == channel.ENGINE_NAME and rest.split()[0] not in ("Z", "X")


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
