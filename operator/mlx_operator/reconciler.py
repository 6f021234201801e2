"""Reconcile: observe, decide, act, for one ModelInstance at a time.

Order of effects: status first, with the resourceVersion that was planned from; the actions only after that was
answered with success; the events last. A conflict or an error means: nothing further, plan again.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from mlx_operator.act.actor import Actor
from mlx_operator.act.kube import KubeError, Manifest
from mlx_operator.act.recorder import Recorder
from mlx_operator.act.resources import INSTANCES, Resource
from mlx_operator.act.status_writer import ConflictError, StatusWriter, Written, wire
from mlx_operator.apart import apart
from mlx_operator.decide.actions import Notice, Plan
from mlx_operator.decide.observed import Observed
from mlx_operator.decide.stored import read
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator.turns import Turns
from mlx_operator.workqueue import WorkQueue
from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.status import Status

DEADLINE_SECONDS = 100.0
"""A status and two children, each at its longest; what is left is planned again."""
_CONFLICTS = 5
_BUGS = 1000
_SOONEST_SECONDS = 0.1
Planner = Callable[[Observed, datetime], Plan]


@dataclass(frozen=True, slots=True)
class _Unconfirmed:
    """A status whose PATCH was not answered: if it turns out to stand, its events are still due."""

    uid: str
    planned_from: str
    """The resourceVersion that it was to replace: while the object has that, nothing is known yet."""
    status: Manifest
    events: tuple[Notice, ...]


class Reconciler:
    """The control loop; `run_worker` several times gives several workers."""

    def __init__(
        self,
        *,
        store: Store,
        queue: WorkQueue[Key],
        planner: Planner,
        writer: StatusWriter,
        actor: Actor,
        recorder: Recorder,
        answered: Callable[[Resource, Mapping[str, Any]], None],
        now: Callable[[], datetime],
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._queue = queue
        self._plan = planner
        self._writer = writer
        self._actor = actor
        self._recorder = recorder
        self._answered = answered
        self._now = now
        self._metrics = metrics
        self._unconfirmed: dict[Key, _Unconfirmed] = {}
        self._bugs: set[str] = set()
        self._turns = Turns(store)

    async def run_worker(self) -> None:
        """Take keys from the queue until cancelled; no failure of a reconcile ends it."""
        while True:
            key = await self._queue.get()
            ok = False
            try:
                ok = await self._turn(key)
            finally:
                self._queue.done(key, ok=ok)

    async def _turn(self, key: Key) -> bool:
        with self._metrics.reconcile_seconds.time():
            error = await apart(self._bounded(key), name=f"reconcile {key}")
        if error is not None:
            self._failed(key, error)
        return error is None

    async def _bounded(self, key: Key) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.reconcile(key)

    def _failed(self, key: Key, error: BaseException) -> None:
        self._metrics.reconcile_errors.labels(type(error).__name__).inc()
        if isinstance(error, (KubeError, TimeoutError)):
            decision("reconcile failed, will be repeated", level=logging.WARNING, instance=key, error=error)
            return
        self._metrics.bugs.inc()
        text = f"{key} {type(error).__name__}: {error}"
        decision("bug", level=logging.ERROR, instance=key, error=error, traceback=text not in self._bugs)
        if len(self._bugs) < _BUGS:
            self._bugs.add(text)

    async def reconcile(self, key: Key) -> None:
        """One pass.

        Raises:
            KubeError: something is left to do and may succeed when it is repeated.
        """
        await self._pass(key)
        if (waiting := self._turns.next()) is not None:
            self._queue.add(waiting)

    def _planned(self, key: Key, observed: Observed) -> Plan:
        plan = self._plan(replace(observed, turn=False), self._now())
        if plan.waits and self._turns.take(key):
            return self._plan(observed, self._now())
        return plan

    async def _pass(self, key: Key) -> None:
        for _ in range(_CONFLICTS):
            observed = self._store.observed(key)
            if observed is None or observed.instance["metadata"].get("deletionTimestamp"):
                # The children go by their ownerReferences.
                self._store.refusals.forget(key)
                self._unconfirmed.pop(key, None)
                return
            self._confirm(key, observed.instance)
            plan = self._planned(key, observed)
            try:
                instance = await self._write(key, observed.instance, plan)
            except ConflictError as conflict:
                self._answered(INSTANCES, conflict.fresh)
                continue
            if instance is not None:
                await self._act(key, instance, plan)
            return
        raise KubeError(409, "Conflict", f"the status changed {_CONFLICTS} times while it was planned")

    async def _write(self, key: Key, instance: Mapping[str, Any], plan: Plan) -> Mapping[str, Any] | None:
        """Make the planned status stand; the object then, or None when it is gone."""
        try:
            written, answer = await self._writer.write(instance, plan.status)
        except KubeError as error:
            if error.status == 404:
                return None  # its DELETED event, or the next sweep, removes it from the store
            if error.ambiguous:
                metadata = instance["metadata"]
                self._unconfirmed[key] = _Unconfirmed(
                    metadata["uid"], metadata["resourceVersion"], wire(plan.status), plan.events
                )
            raise
        if written is Written.WRITTEN:
            self._unconfirmed.pop(key, None)  # it did not stand: this one was written in its place
            self._account(key, instance, plan.status)
            self._answered(INSTANCES, answer)
        return answer

    async def _act(self, key: Key, instance: Mapping[str, Any], plan: Plan) -> None:
        now = self._now()
        if plan.requeue_at is not None:
            delay = (plan.requeue_at - now).total_seconds()
            self._queue.add_after(key, max(_SOONEST_SECONDS, delay))
        try:
            await self._actor.perform(key, instance, plan.actions)
        finally:
            # Also when an action failed: the next plan has this status behind it and will not say it again.
            self._tell(instance, plan.events, now)

    def _confirm(self, key: Key, instance: Mapping[str, Any]) -> None:
        pending, metadata = self._unconfirmed.get(key), instance["metadata"]
        if pending is None or (pending.uid, pending.planned_from) == (metadata["uid"], metadata["resourceVersion"]):
            return
        del self._unconfirmed[key]
        if metadata["uid"] == pending.uid and instance.get("status") == pending.status:
            self._tell(instance, pending.events, self._now())

    def _tell(self, instance: Mapping[str, Any], notices: Iterable[Notice], now: datetime) -> None:
        """Each a moment after the one before it: `kubectl events` sorts by time."""
        for number, notice in enumerate(notices):
            self._recorder.emit(instance, notice, now + timedelta(microseconds=number))

    def _account(self, key: Key, before: Mapping[str, Any], status: Status) -> None:
        ready, failed = status.condition(ConditionType.READY), status.condition(ConditionType.RUNNER_FAILED)
        failing = failed is not None and failed.status == "True" and bool(status.history)
        decision(
            "status written",
            instance=key,
            epoch=status.epoch,
            rank=status.history[0].rank if failing else None,
            ready=ready.status if ready else None,
            reason=ready.reason if ready else None,
            runners=" ".join(f"{runner.rank}={runner.state}" for runner in status.runners),
            brief=status.brief[0] if status.brief else None,
        )
        self._metrics.written(read(before), status)
