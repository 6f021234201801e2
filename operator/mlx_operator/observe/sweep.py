"""Full lists: before anything plans, and again and again afterwards.

The watches lose deletions when they start over and see nothing of a list that became empty; only a full list,
compared by uid, heals that.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import INSTANCES, NODES, PODS, SERVICES, Resource
from mlx_operator.errors import Refusals, StartError
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store, slimmer
from mlx_operator_api import names

PERIOD_SECONDS = (60.0, 300.0)
_RETRY_SECONDS = 5.0
_QUIET_SECONDS = 1.0
_REPLAY_SECONDS = 3.0
FIRST_SECONDS = _REPLAY_SECONDS + _QUIET_SECONDS
"""Until the first sweep: the watches have listed by then, and tell nothing of what went between our list and theirs."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What is watched: everything, or some namespaces (then nodes are not ours to see)."""

    namespaces: tuple[str, ...] = ()

    @property
    def watches_nodes(self) -> bool:
        """Nodes are cluster-scoped: Roles cannot show them."""
        return not self.namespaces

    def lists(self) -> list[tuple[Resource, str | None, str | None]]:
        """Kind, namespace (None: all) and label selector of every list that makes up the picture."""
        places: tuple[str | None, ...] = self.namespaces or (None,)
        found: list[tuple[Resource, str | None, str | None]] = []
        for place in places:
            found += [(INSTANCES, place, None), (PODS, place, names.INSTANCE_LABEL)]
            found.append((SERVICES, place, names.INSTANCE_LABEL))
        if self.watches_nodes:
            found.append((NODES, None, None))
        return found


class Lister:
    """Takes over full lists into the store."""

    def __init__(self, kube: Kube, store: Store, scope: Scope, metrics: Metrics) -> None:
        self._kube = kube
        self._store = store
        self._scope = scope
        self._metrics = metrics

    async def load(self, touched: set[Key]) -> None:
        """List every kind; adds the instances for which anything was new to `touched`, also where a later list fails.

        Raises:
            KubeError: with the kind in its message.
        """
        for resource, namespace, labels in self._scope.lists():
            try:
                items, version = await self._kube.list(resource, namespace, labels=labels, keep=slimmer(resource))
            except KubeError as error:
                what = f"list {resource.plural} in namespace {namespace}" if namespace else f"list {resource.plural}"
                raise KubeError(error.status, error.reason, f"{what}: {error.message}") from error
            touched |= self._store.replace(resource, items, version, namespace)
            self._metrics.watched(resource.plural)

    async def seed(self) -> None:
        """The start barrier: the whole picture, or no operator. Waits for an API server that does not answer.

        Raises:
            StartError: permissions or the CRD are missing; no waiting helps.
        """
        delay, refusals = 0.2, Refusals()
        while True:
            try:
                await self.load(set())  # at the start all are planned anyway
            except KubeError as error:
                final = error.status in (403, 404) and refusals.final()
                if error.status == 403 and final:
                    raise StartError(
                        f"RBAC does not let the operator see what it works on ({error.message}): "
                        "install the chart's ClusterRole and binding, or its Roles and --watch-namespace"
                    ) from error
                if error.status == 404 and final:
                    raise StartError(
                        f"the API server does not know ModelInstances ({error.message}): "
                        "install the CRD first (helm/mlx-operator-crds)"
                    ) from error
                decision("waiting for the API server", level=logging.WARNING, error=error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_SECONDS)
            else:
                return


class Sweeper:
    """Repeats the lists: at random intervals, and soon after a watch had to start over."""

    def __init__(
        self, lister: Lister, changed: Callable[[Key], None], metrics: Metrics, period: tuple[float, float]
    ) -> None:
        self._lister = lister
        self._changed = changed
        self._metrics = metrics
        self._period = period
        self._wanted = asyncio.Event()
        self._started = asyncio.get_running_loop().time()
        self._replaying = True
        self._relisted_at = self._started

    def relisted(self) -> None:
        """A watch replayed an object: it started over. At the start of the process that means nothing."""
        now = asyncio.get_running_loop().time()
        quiet = now - self._relisted_at > _QUIET_SECONDS and now - self._started > _REPLAY_SECONDS
        self._relisted_at = now
        if quiet:
            self._replaying = False
        if not self._replaying:
            self._wanted.set()

    async def run(self) -> None:
        """Sweep until cancelled."""
        delay = min(FIRST_SECONDS, random.uniform(*self._period))  # noqa: S311 (jitter is no secret)
        while True:
            try:
                async with asyncio.timeout(delay):  # not wait_for, which swallows a cancellation at that very moment
                    await self._wanted.wait()
                await asyncio.sleep(_QUIET_SECONDS)  # the rest of the replay
            except TimeoutError:
                pass
            self._wanted.clear()
            delay = random.uniform(*self._period) if await self._sweep() else _RETRY_SECONDS  # noqa: S311

    async def _sweep(self) -> bool:
        touched: set[Key] = set()
        try:
            await self._lister.load(touched)
        except KubeError as error:
            self._metrics.sweeps.labels("failed").inc()
            decision("sweep failed", level=logging.WARNING, error=error)
            return False
        else:
            self._metrics.sweeps.labels("done").inc()
            return True
        finally:
            # Also of the lists before the one that failed: the next sweep finds nothing new in them.
            for key in touched:
                self._metrics.swept.inc()
                self._changed(key)
            if touched:
                decision("sweep found changes", instances=len(touched))
