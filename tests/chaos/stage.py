"""A world behind a bad network, and what must hold in it whatever happens."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import PODS, Resource
from tests.apiserver.harness import OperatorProcess, World, apply_chart, eventually, groups_of, world
from tests.apiserver.kubelet import Kubelet
from tests.chaos.proxy import FaultProxy
from tests.cluster.apiserver import ApiServer
from tests.cluster.audit import Request
from tests.cluster.deploy import RELEASE

_ACCEPTED = re.compile(r"(\w+) accepted: .* rank=\d+ epoch=(\d+) ")
_LOOK_SECONDS = 0.05
BUSIEST = 100
"""Requests in any 2 s of one operator with a handful of instances: a loop without a back-off sends hundreds."""


class Engines:
    """Looks all the time at the processes of every pod: never two engines of one rank."""

    def __init__(self, kubelet: Kubelet) -> None:
        self._kubelet = kubelet
        self.doubled: list[str] = []
        self.looks = 0

    async def watch(self) -> None:
        """Look until cancelled."""
        while True:
            for container in tuple(self._kubelet.containers.values()):
                engines = self._kubelet.engines(container)
                self.looks += 1
                if len(engines) > 1:
                    self.doubled.append(f"{container.name}: {engines}")
            await asyncio.sleep(_LOOK_SECONDS)


class Stage:
    """One namespace, whose operator reaches the API server through `proxy`; the kubelet and the test reach it directly.

    Args:
        identity: user that all operators are to the API server.
        flags: of every operator that is started.
    """

    def __init__(
        self, place: World, proxy: FaultProxy, engines: Engines, identity: str, flags: tuple[str, ...]
    ) -> None:
        self.place = place
        self.proxy = proxy
        self.engines = engines
        self.identity = identity
        self.flags = flags
        self.mark = place.audit.mark()
        self.began = asyncio.get_running_loop().time()

    def deployment(
        self, proxy: FaultProxy | None = None, replica: int = 0
    ) -> AbstractAsyncContextManager[list[OperatorProcess]]:
        """An operator behind a proxy that is started again whenever it ends."""
        return self.place.deployment(*self.through(proxy or self.proxy), replica=replica)

    def through(self, proxy: FaultProxy) -> tuple[str, ...]:
        """Flags of an operator behind a proxy."""
        kubeconfig = proxy.write_kubeconfig(self.place.folder / f"{proxy.name}.kubeconfig")
        return ("--kubeconfig", str(kubeconfig), *self.flags)

    async def delete_pod(self, name: str) -> None:
        """Delete a pod, as a user does; nothing where there is none."""
        await delete(self.place, PODS, name)

    # -- what must hold
    def took_up(self, pod: str) -> list[tuple[str, int]]:
        """What the supervisors under a pod's name took up, as (task, epoch), by their own logs."""
        text = (self.place.folder / f"{pod}.log").read_text(errors="replace")
        return [(task, int(epoch)) for task, epoch in _ACCEPTED.findall(text)]

    def accepted(self, pod: str) -> Counter[tuple[str, int]]:
        """How often that was."""
        return Counter(self.took_up(pod))

    def created(self, resource: str) -> int:
        """How many objects of a kind this stage's operators made."""
        asked = self.place.audit.requests(self.mark, verbs={"create"}, resources={resource})
        return sum(1 for r in asked if self._ours(r) and r.namespace == self.place.namespace and r.code == 201)

    def _ours(self, request: Request) -> bool:
        """Of a replica of this stage."""
        return request.user.rpartition("-")[0] == self.place.namespace

    def check(self, operators: list[OperatorProcess]) -> None:
        """Nothing was doubled, nobody span, nothing broke."""
        assert self.engines.looks, "nobody looked at the engines"
        assert not self.engines.doubled, f"two engines of one rank: {self.engines.doubled}"
        busiest = self.proxy.busiest(self.began, 2.0)
        assert busiest <= BUSIEST, f"{busiest} requests within 2 s"
        for operator in operators:
            text = operator.lines()
            assert "msg=bug" not in text, text[-5000:]
            ours = [line for line in text.splitlines() if "Traceback" in line and "logger=kopf" not in line]
            assert not ours, ours

    async def idle(self, seconds: float = 1.5) -> None:
        """Wait until no replica has written anything for a while."""
        loop, audit = asyncio.get_running_loop(), self.place.audit
        mark, quiet = audit.mark(), loop.time()

        async def look() -> bool:
            nonlocal mark, quiet
            if any(self._ours(request) for request in audit.writes(mark)):
                mark, quiet = audit.mark(), loop.time()
            return loop.time() - quiet > seconds

        await eventually(look, "nothing is written any more")


async def delete(place: World, resource: Resource, name: str) -> None:
    """Delete an object of this name, if there is one."""
    try:
        found = await place.kube.get(resource, place.namespace, name)
        await place.kube.delete(resource, place.namespace, name, uid=found["metadata"]["uid"])
    except KubeError as error:
        if error.status not in (404, 409):
            raise


@asynccontextmanager
async def stage(
    server: ApiServer, namespace: str, folder: Path, *, seed: int = 0, confined: bool = True
) -> AsyncIterator[Stage]:
    """A stage, in a namespace that is made for it.

    A confined operator serves its namespace alone and has its Lease and key there, so that several stages can be used
    at once. Otherwise it is installed as usual, and serves all namespaces.
    """
    async with world(server, namespace, folder) as place:
        flags: tuple[str, ...] = ()
        identity = place.user
        if confined:
            values = f"--set=watchNamespaces={{{namespace}}}"
            await asyncio.to_thread(apply_chart, server, RELEASE, values, namespace=namespace)
            identity = f"system:serviceaccount:{namespace}:{RELEASE}"
            flags = ("--namespace", namespace, "--watch-namespace", namespace)
        place.user = f"{namespace}-a"  # as the audit log names the impersonator
        engines = Engines(place.kubelet)
        looking = asyncio.create_task(engines.watch(), name="engines")
        try:
            async with FaultProxy(server, place.user, identity, groups_of(identity), seed) as proxy:
                yield Stage(place, proxy, engines, identity, flags)
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)


def way(staged: Stage, letter: str, seed: int = 0) -> FaultProxy:
    """A way of its own for another replica, which the audit log tells apart."""
    place, identity = staged.place, staged.identity
    return FaultProxy(place.server, f"{place.namespace}-{letter}", identity, groups_of(identity), seed)
