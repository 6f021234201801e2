"""Leadership through a coordination.k8s.io Lease, with the rules of client-go's leader election.

A candidate takes over a Lease that its holder gave back, or that did not change for its duration by our own
monotonic clock (clocks of other machines are never trusted). A leader that could not renew for the renew deadline has
lost, also while a request hangs. Each new leadership counts `leaseTransitions` up; the runners refuse tasks of a
lower count. Each therefore counts at least the seconds since 2024, which is above that of a deleted Lease and above
that of an operator that ran without one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlx_operator.act.kube import Kube, KubeError, Manifest
from mlx_operator.act.resources import LEASES
from mlx_operator.errors import Refusals, StartError
from mlx_operator.logs import decision


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how long a silent leader keeps the Lease, gives up itself, waits between tries, waits for an answer."""

    duration: float = 10.0
    renew_deadline: float = 7.0
    retry: float = 2.0
    request: float = 3.0


_JUST_AFTER = 0.05
_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)


def first_transitions(now: datetime) -> int:
    """The least `leaseTransitions` of a leadership that begins now: earlier ones grew slower than the clock (int32)."""
    return int((now - _EPOCH).total_seconds())


class Lease:
    """One candidate.

    Args:
        identity: differs for every process.
        pod: our pod, where it is known. What it ran before us has ended (a container restarted), so a Lease of an
            identity that begins with it and an underscore is free.
        now: the wall clock, for the times that people read.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        identity: str,
        *,
        now: Callable[[], datetime],
        timing: Timing,
        pod: str | None = None,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._now = now
        self._timing = timing
        self._pod = pod
        self._lease: Manifest | None = None
        self._seen: tuple[str, float] = ("", 0.0)
        self._renewed = 0.0
        """When the request began by which we hold it: that is what the others may go by."""
        self.readable = False
        """The last try to read the Lease succeeded: a standby that could take over."""

    async def acquire(self) -> int:
        """Wait until we lead; returns our `leaseTransitions`, which no earlier leader had.

        Raises:
            StartError: we may not use the Lease.
        """
        told, refusals = "", Refusals()
        while True:
            try:
                held_by = await self._try()
                self.readable = True
                refusals.clear()
            except KubeError as error:
                if error.status == 403 and refusals.final():
                    raise StartError(
                        f"RBAC does not let the operator use Lease {self._namespace}/{self._name} ({error.message}): "
                        "install the chart's Role and binding, or correct --namespace and --lease-name"
                    ) from error
                self.readable = False
                held_by = ""
                decision("the Lease cannot be taken", level=logging.WARNING, error=error)
            if held_by == self._identity and self._lease is not None:
                transitions = _transitions(self._lease)
                decision("leading", identity=self._identity, lease_transitions=transitions)
                return transitions
            if held_by != told:
                decision("standing by", leader=held_by or None)
                told = held_by
            await asyncio.sleep(self._pause())

    async def hold(self, lost: Callable[[str], None]) -> None:
        """Renew until cancelled, or until leadership is lost: then `lost` is called with the reason, once.

        The deadline is a timer of the event loop: it comes due although a request hangs.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.call_at(self._renewed + self._timing.renew_deadline, lost, self._too_late())
        try:
            while True:
                await asyncio.sleep(self._timing.retry)
                try:
                    await self._renew()
                except KubeError as error:
                    decision("the Lease was not renewed", level=logging.WARNING, error=error)
                    if error.status == 409 and (holder := await self._holder()) not in (None, self._identity):
                        deadline.cancel()
                        lost(f"{holder or 'nobody'} holds the Lease")
                        return
                    continue
                deadline.cancel()
                deadline = loop.call_at(self._renewed + self._timing.renew_deadline, lost, self._too_late())
        finally:
            deadline.cancel()

    async def release(self) -> None:
        """Give the Lease back, so that a standby need not wait; best effort."""
        if self._lease is None:
            return
        try:
            try:
                await self._put(self._given_back())
            except KubeError as error:
                # A renewal that was cut short may have been carried out: our record is outdated then.
                if error.status != 409 or await self._holder() != self._identity:
                    raise
                await self._put(self._given_back())
        except KubeError as error:
            decision("the Lease was not released", level=logging.WARNING, error=error)
        else:
            decision("lease released", identity=self._identity)

    async def _try(self) -> str:
        """Read the Lease and take it if it is free; returns its holder then."""
        try:
            lease = await self._read()
        except KubeError as error:
            if error.status != 404:
                raise
            return await self._first()
        self._lease = lease
        holder = _holder(lease)
        if holder and not self._predecessor(holder) and not self._expired(lease):
            return holder
        transitions = max(_transitions(lease) + 1, first_transitions(self._now()))
        # Also of a request that is not answered: the Lease may show later that it was carried out.
        self._renewed = asyncio.get_running_loop().time()
        try:
            await self._put(self._spec(transitions))
        except KubeError as error:
            if error.status != 409:
                raise
            return ""  # somebody was faster
        return self._identity

    async def _first(self) -> str:
        body = {
            "apiVersion": LEASES.api_version,
            "kind": LEASES.kind,
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._spec(first_transitions(self._now())),
        }
        self._renewed = asyncio.get_running_loop().time()
        try:
            self._lease = await self._kube.create(LEASES, self._namespace, body, seconds=self._timing.request)
        except KubeError as error:
            if error.status != 409:
                raise
            return ""
        return self._identity

    def _predecessor(self, holder: str) -> bool:
        return self._pod is not None and holder.startswith(f"{self._pod}_")

    def _expired(self, lease: Manifest) -> bool:
        version, now = lease["metadata"]["resourceVersion"], asyncio.get_running_loop().time()
        if self._seen[0] != version:
            self._seen = (version, now)
        return now - self._seen[1] > self._duration(lease)

    def _duration(self, lease: Manifest) -> float:
        return float(_spec(lease).get("leaseDurationSeconds") or self._timing.duration)

    def _pause(self) -> float:
        """Until the next try to take it: at the instant at which it runs out, if that is sooner than the next look."""
        if self._lease is None or not _holder(self._lease):
            return self._timing.retry
        left = self._seen[1] + self._duration(self._lease) - asyncio.get_running_loop().time()
        return min(self._timing.retry, max(0.0, left) + _JUST_AFTER)

    async def _renew(self) -> None:
        began = asyncio.get_running_loop().time()
        await self._put({**_spec(self._lease or {}), "renewTime": self._stamp()})
        self._renewed = began

    async def _holder(self) -> str | None:
        """Who holds it; None when that cannot be read. Our own record is brought up to date."""
        try:
            self._lease = await self._read()
        except KubeError:
            return None
        return _holder(self._lease)

    async def _read(self) -> Manifest:
        return await self._kube.get(LEASES, self._namespace, self._name, seconds=self._timing.request)

    async def _put(self, spec: dict[str, Any]) -> None:
        body = {**(self._lease or {}), "spec": spec}
        self._lease = await self._kube.replace(LEASES, self._namespace, self._name, body, seconds=self._timing.request)

    def _spec(self, transitions: int) -> dict[str, Any]:
        stamp = self._stamp()
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._timing.duration)),
            "acquireTime": stamp,
            "renewTime": stamp,
            "leaseTransitions": transitions,
        }

    def _given_back(self) -> dict[str, Any]:
        spec = _spec(self._lease or {})
        return {**spec, "holderIdentity": "", "renewTime": self._stamp(), "leaseDurationSeconds": 1}

    def _stamp(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def _too_late(self) -> str:
        return f"the Lease was not renewed for {self._timing.renew_deadline:g} s"


def _spec(lease: Manifest) -> dict[str, Any]:
    """What it says; nothing for one that somebody made as an empty object."""
    return lease.get("spec") or {}


def _holder(lease: Manifest) -> str:
    return str(_spec(lease).get("holderIdentity") or "")


def _transitions(lease: Manifest) -> int:
    return int(_spec(lease).get("leaseTransitions") or 0)


async def lead(lease: Lease, work: Callable[[int], Awaitable[None]], lost: Callable[[str], None]) -> None:
    """Wait for the Lease, work under its `leaseTransitions`, give it back at the end of the work.

    `lost` is called once when leadership ends before the work does, in whatever way the renewing came to an end.
    """
    transitions = await lease.acquire()
    over = False

    def once(why: str) -> None:
        nonlocal over
        if not over:
            over = True
            lost(why)

    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            decision("bug while renewing the Lease", level=logging.ERROR, error=error, traceback=True)
        once("the Lease is no longer renewed")

    holding = asyncio.create_task(lease.hold(once), name="lease")
    holding.add_done_callback(ended)
    try:
        await work(transitions)
    finally:
        over = True
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await lease.release()
