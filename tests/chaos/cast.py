"""Who takes part in a random walk, and what must be true of all of them when it rests."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES, SERVICES
from mlx_operator_api import names
from tests.apiserver.harness import Manifest, OperatorProcess, World, eventually, is_ready
from tests.apiserver.kubelet import Container
from tests.chaos.proxy import FaultProxy
from tests.chaos.stage import BUSIEST, Stage, stage, way
from tests.cluster.apiserver import ApiServer

INSTANCE_NAMES = ("red", "blue")
_SPEC: Manifest = {
    "deadlines": {"unreachable": "5s"},
    "restartPolicy": {"maxRestarts": 1000, "backoff": {"initial": "200ms", "max": "1s"}},
}
_HISTORY = 5
CONVERGED_SECONDS = 120.0


@dataclass
class Cast:
    """Two replicas behind a proxy each, two instances, one API server."""

    staged: Stage
    proxies: tuple[FaultProxy, FaultProxy]
    replicas: tuple[list[OperatorProcess], list[OperatorProcess]]
    instances: tuple[str, ...] = INSTANCE_NAMES
    api_server: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever takes the API server away."""
    changed: set[str] = field(default_factory=set)
    """Instances that somebody changed since all rested: their epochs end also without a failure."""
    killed: set[tuple[str, int]] = field(default_factory=set)
    """(instance, epoch) of the engines that were killed since all rested."""

    @property
    def place(self) -> World:
        """The world."""
        return self.staged.place

    @property
    def operators(self) -> list[OperatorProcess]:
        """Every operator so far."""
        return [*self.replicas[0], *self.replicas[1]]

    def kill_engine(self, pod: str) -> None:
        """Kill the engine of a pod that has one in use, and remember of which epoch it was."""
        container = self._container(pod)
        engines = self.place.kubelet.engines(container) if container is not None else []
        if engines:
            self._remember(pod)
            os.kill(engines[0], signal.SIGKILL)

    def kill_supervisor(self, pod: str) -> None:
        """Kill all processes of a pod that runs."""
        container = self._container(pod)
        if container is None or container.process is None or container.process.returncode is not None:
            return
        if self.place.kubelet.engines(container):
            self._remember(pod)
        self.place.kubelet.kill(pod)

    def _container(self, pod: str) -> Container | None:
        return next((c for c in self.place.kubelet.containers.values() if c.name == pod), None)

    def _remember(self, pod: str) -> None:
        # The last one: the log goes on when an instance is deleted and made again, whose epochs begin anew.
        epochs = [epoch for task, epoch in self.staged.took_up(pod) if task == "CreateRunner"]
        if epochs:
            self.killed.add((pod.rpartition("-")[0], epochs[-1]))

    async def create(self) -> None:
        """Bring every instance into being that is not there, and resume what is suspended."""
        for name in self.instances:
            await eventually(lambda name=name: self._whole(name), f"{name} is there", 30)  # type: ignore[misc]

    async def _whole(self, name: str) -> bool:
        try:
            found = await self.place.get(name)
            if found["spec"].get("suspend"):
                body = {"spec": {"suspend": False}}
                await self.place.kube.merge_patch(INSTANCES, self.place.namespace, name, body)
        except KubeError as error:
            if error.status != 404:
                return False
            try:
                await self.place.create(name, **_SPEC)
            except KubeError:
                return False
        return True

    async def rest(self) -> float:
        """Wait until all is as it should be; returns how long that took. Nothing may be in trouble any more."""
        began = asyncio.get_running_loop().time()
        await self.create()
        await self._ready()
        took = asyncio.get_running_loop().time() - began
        await eventually(self._tidy, "pods and Services are those of the specs", 60)
        await self.staged.idle()
        await self._ready()  # also those that were not known to be changed or killed when they were looked at first
        self.staged.check(self.operators)
        for proxy in self.proxies:
            assert proxy.busiest(self.staged.began, 2.0) <= BUSIEST, f"{proxy.name}: too many requests"
        self.changed.clear()
        self.killed.clear()
        return took

    async def _ready(self) -> None:
        for name in self.instances:
            killed = {epoch for instance, epoch in self.killed if instance == name and name not in self.changed}

            def again(instance: Manifest, after: int = max(killed, default=0)) -> bool:
                # Ready of an earlier epoch was written before the failure could be.
                return is_ready(instance) and instance["status"]["epoch"] > after

            what = f"{name} is Ready after the epochs {sorted(killed)}, whose engines were killed"
            ready = await self.place.until(again, what, name=name, seconds=CONVERGED_SECONDS)
            known = {failure["epoch"] for failure in ready["status"].get("history", ())}
            for epoch in killed:
                status = ready["status"]
                kept = status["epoch"] - epoch <= _HISTORY
                assert epoch in known or not kept, f"{name}: the failure of epoch {epoch} is not in history: {status}"

    async def _tidy(self) -> bool:
        wanted = set()
        for name in self.instances:
            spec = (await self.place.get(name))["spec"]
            wanted |= {names.pod_name(name, rank) for rank in range(spec["runners"])}
        pods = [pod["metadata"]["name"] for pod in await self.place.pods()]
        services, _ = await self.place.kube.list(SERVICES, self.place.namespace)
        return sorted(pods) == sorted(wanted) and {s["metadata"]["name"] for s in services} == set(self.instances)


@asynccontextmanager
async def cast(server: ApiServer, namespace: str, folder: Path, seed: int) -> AsyncIterator[Cast]:
    """All of them, at rest."""
    async with AsyncExitStack() as stack:
        staged = await stack.enter_async_context(stage(server, namespace, folder, seed=seed, confined=False))
        second = await stack.enter_async_context(way(staged, "b", seed=seed + 1))
        first_replica = await stack.enter_async_context(staged.deployment())
        second_replica = await stack.enter_async_context(staged.deployment(second, replica=1))
        made = Cast(staged, (staged.proxy, second), (first_replica, second_replica))
        await made.rest()
        yield made
