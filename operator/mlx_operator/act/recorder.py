"""Records Events (events.k8s.io/v1): beside the reconcile, under names that sort, repeats folded into a series."""

import asyncio
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlx_operator.act.kube import Kube, KubeError, Manifest
from mlx_operator.act.resources import EVENTS, INSTANCES, PODS
from mlx_operator.decide.actions import Notice
from mlx_operator.errors import Refusals
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator_api import names

MAX_NOTE_BYTES = 1024
_MAX_INSTANCE = 128
_LANES = 4
_WAITING = 1000
"""In each of them."""
_ATTEMPTS = 8
"""With the pauses between them half a minute: an API server that starts anew costs no Event."""
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 10.0
_FLUSH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _Pending:
    namespace: str
    body: Manifest
    about: Mapping[str, Any]


class Recorder:
    """Bounded queues and a task each that posts from it; a reconcile never waits for an Event and never fails by one.

    All Events of an instance stand in one of the queues, so they are posted in their order.
    """

    def __init__(self, kube: Kube, *, reporter: str, metrics: Metrics) -> None:
        self._kube = kube
        self._reporter = reporter[:_MAX_INSTANCE]
        self._metrics = metrics
        self._refusals = Refusals()
        self._lanes: tuple[asyncio.Queue[_Pending], ...] = tuple(asyncio.Queue(_WAITING) for _ in range(_LANES))

    def emit(self, instance: Mapping[str, Any], notice: Notice, now: datetime) -> None:
        """Queue an Event; the oldest one is dropped where too many wait."""
        body = event(instance, notice, now, self._reporter)
        metadata = instance["metadata"]
        about: dict[str, Any] = {"instance": f"{metadata['namespace']}/{metadata['name']}", "epoch": notice.epoch}
        about |= {"rank": notice.rank, "reason": notice.reason}
        decision("event", **about, type=notice.type, note=body["note"])
        lane = self._lanes[zlib.crc32(metadata["uid"].encode()) % _LANES]
        if lane.full():
            dropped = lane.get_nowait()
            lane.task_done()
            self._metrics.events_dropped.inc()
            decision("event dropped: too many wait", level=logging.WARNING, **dropped.about)
        lane.put_nowait(_Pending(metadata["namespace"], body, about))

    async def run(self) -> None:
        """Post until cancelled."""
        async with asyncio.TaskGroup() as posting:
            for lane in self._lanes:
                posting.create_task(self._post_from(lane))

    async def _post_from(self, lane: asyncio.Queue[_Pending]) -> None:
        while True:
            pending = await lane.get()
            try:
                await self._post(pending)
            finally:
                lane.task_done()

    async def posted(self) -> None:
        """Wait until none waits any more."""
        for lane in self._lanes:
            await lane.join()

    async def flush(self) -> None:
        """Give what waits a short time to be posted (a clean stop)."""
        try:
            await asyncio.wait_for(self.posted(), _FLUSH_SECONDS)
        except TimeoutError:
            waiting = sum(lane.qsize() for lane in self._lanes)
            decision("events dropped at the stop", level=logging.WARNING, count=waiting)

    async def _post(self, pending: _Pending) -> None:
        delay = _FIRST_RETRY_SECONDS
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._record(pending)
            except KubeError as error:
                if attempt == _ATTEMPTS or not self._passes(error):
                    self._metrics.events_dropped.inc()
                    decision("event not recorded", level=logging.WARNING, error=error, **pending.about)
                    return
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_RETRY_SECONDS)
            else:
                self._refusals.clear()
                return

    def _passes(self, error: KubeError) -> bool:
        """Whether a repetition may help."""
        doubtful = error.status == 403 and not error.terminating and not self._refusals.final()
        return doubtful or error.transient or error.contended

    async def _record(self, pending: _Pending) -> None:
        try:
            await self._kube.create(EVENTS, pending.namespace, pending.body)
        except KubeError as error:
            if not error.exists:
                raise
            await self._repeat(pending)

    async def _repeat(self, pending: _Pending) -> None:
        """The name is taken: count the repeat, unless it is our own earlier attempt that had been carried out."""
        name = pending.body["metadata"]["name"]
        try:
            known = await self._kube.get(EVENTS, pending.namespace, name)
        except KubeError as error:
            if error.status != 404:
                raise
            # It was old, and has just gone.
            await self._kube.create(EVENTS, pending.namespace, pending.body)
            return
        time = pending.body["eventTime"]
        series = known.get("series") or {}
        if time in (known.get("eventTime"), series.get("lastObservedTime")):
            return
        # The API asks for at least 2, and everything else of an Event is immutable.
        patch = {"series": {"count": int(series.get("count") or 1) + 1, "lastObservedTime": time}}
        await self._kube.merge_patch(EVENTS, pending.namespace, name, patch)


def event(instance: Mapping[str, Any], notice: Notice, now: datetime, reporter: str) -> Manifest:
    """The Event of a notice. Its name sorts by epoch and step of the story: describe lists Events by name."""
    metadata = instance["metadata"]
    rank = "" if notice.rank is None else f".r{notice.rank}"
    name = f"{metadata['name']}.{metadata['uid'][:8]}.e{notice.epoch:04d}.{notice.step:02d}.{notice.reason.ordinal:03d}"
    body: Manifest = {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {"name": f"{name}.{notice.reason.lower()}{rank}", "namespace": metadata["namespace"]},
        "type": notice.type,
        "reason": notice.reason,
        "action": notice.action,
        "note": cut(notice.note),
        "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": names.CONTROLLER,
        "reportingInstance": reporter,
        "regarding": _reference(INSTANCES.api_version, INSTANCES.kind, metadata["name"], metadata),
    }
    if notice.related is not None:
        pod, uid = notice.related
        body["related"] = _reference(PODS.api_version, PODS.kind, pod, {**metadata, "uid": uid})
    return body


def cut(note: str) -> str:
    """At most 1024 bytes (the API counts bytes), ending on a whole character."""
    data = note.encode()
    if len(data) <= MAX_NOTE_BYTES:
        return note
    mark = "…"
    return data[: MAX_NOTE_BYTES - len(mark.encode())].decode(errors="ignore") + mark


def _reference(api_version: str, kind: str, name: str, metadata: Mapping[str, Any]) -> Manifest:
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": name,
        "namespace": metadata["namespace"],
        "uid": metadata["uid"],
    }
