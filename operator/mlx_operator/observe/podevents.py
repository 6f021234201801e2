"""The scheduler's and the kubelet's own words about pods that do not run, or whose container just ended.

No requests while all run.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import CORE_EVENTS
from mlx_operator.apart import apart
from mlx_operator.logs import decision
from mlx_operator.metrics import Metrics
from mlx_operator.observe.runners import address
from mlx_operator.observe.shelf import Key, Manifest
from mlx_operator.observe.store import Store
from mlx_operator_api import names

PATIENCE_SECONDS = 5.0
PERIOD_SECONDS = 10.0
LONGEST_PERIOD_SECONDS = 60.0
"""For a pod of which nothing new was said for long."""
SPACING_SECONDS = 0.1
"""Between two requests: a cluster that is full has many waiting pods."""
ENDED_SECONDS = 30.0
"""How long after the end of a container its Events are of interest."""
_NOTES = 3
_PLACED = ("FailedScheduling",)
_MOUNTED = (*_PLACED, "FailedMount", "FailedAttachVolume", "FailedMapVolume", "FailedCreatePodSandBox")
_OVERCOME = {
    "Scheduled": _PLACED,
    "SuccessfulAttachVolume": ("FailedAttachVolume",),
    "Pulling": _MOUNTED,
    "Pulled": _MOUNTED,
    "Created": _MOUNTED,
}
"""Which warnings are over once the pod has got so far."""


class PodEvents:
    """Reads the Events of such pods, each pod at most once per period, all of them at a bounded rate."""

    def __init__(
        self,
        kube: Kube,
        store: Store,
        *,
        changed: Callable[[Key], None],
        now: Callable[[], datetime],
        metrics: Metrics,
    ) -> None:
        self._kube = kube
        self._store = store
        self._changed = changed
        self._now = now
        self._metrics = metrics
        self._due: dict[str, datetime] = {}
        self._period: dict[str, float] = {}
        self._some = asyncio.Event()

    def pod_changed(self, uid: str) -> None:
        """Begin or end to ask about a pod."""
        pod = self._store.pod(uid)
        ended = pod is not None and self._ended_of_late(pod)
        if pod is None or not (waits(pod) or ended):
            self._forget(uid)
            self._store.set_warnings(uid, ())
        elif ended:
            self._due[uid] = self._now()  # what it ended for is known now, and the next epoch does not wait for it
            self._some.set()
        elif uid not in self._due:
            created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
            self._due[uid] = max(self._now(), created + timedelta(seconds=PATIENCE_SECONDS))
            self._some.set()

    def _ended_of_late(self, pod: Manifest) -> bool:
        finished = (last_end(pod) or {}).get("finishedAt")
        since = timedelta(seconds=ENDED_SECONDS)
        return finished is not None and self._now() - datetime.fromisoformat(finished) < since

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            if not self._due:
                self._some.clear()
                await self._some.wait()
            uid, due = min(self._due.items(), key=lambda item: item[1])
            wait = (due - self._now()).total_seconds()
            if wait > 0:
                await asyncio.sleep(min(wait, 1.0))
                continue
            error = await apart(self._read(uid), name=f"events of pod {uid}")
            if error is not None:
                self._not_understood(uid, error)
            if uid in self._due:
                self._due[uid] = self._now() + timedelta(seconds=self._period.get(uid, PERIOD_SECONDS))
            await asyncio.sleep(SPACING_SECONDS)

    async def _read(self, uid: str) -> None:
        pod = self._store.pod(uid)
        if pod is None or not (waits(pod) or self._ended_of_late(pod)):
            self._forget(uid)
            return
        namespace = pod["metadata"]["namespace"]
        try:
            events, _ = await self._kube.list(CORE_EVENTS, namespace, fields=f"involvedObject.uid={uid}")
        except KubeError as error:
            decision("events of a pod cannot be read", level=logging.WARNING, error=error, pod_uid=uid)
            return
        if uid not in self._due:  # it runs by now
            return
        touched = self._store.set_warnings(uid, notes(events, last_end(pod)))
        for key in touched:
            self._changed(key)
        known = self._period.get(uid, PERIOD_SECONDS / 2)
        self._period[uid] = PERIOD_SECONDS if touched else min(LONGEST_PERIOD_SECONDS, known * 2)

    def _not_understood(self, uid: str, error: BaseException) -> None:
        """An Event that no rule foresees costs its own pod its words, and no other pod anything."""
        self._metrics.bugs.inc()
        self._period[uid] = LONGEST_PERIOD_SECONDS
        decision("bug in the events of a pod", level=logging.ERROR, error=error, traceback=True, pod_uid=uid)

    def _forget(self, uid: str) -> None:
        self._due.pop(uid, None)
        self._period.pop(uid, None)


def waits(pod: Manifest) -> bool:
    """The pod is meant to run and its container does not."""
    if pod["metadata"].get("deletionTimestamp") or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return False
    return address(pod) is None


def last_end(pod: Manifest) -> dict[str, Any] | None:
    """How the runner container, or the one before it, ended; None: none ended."""
    found = (pod.get("status") or {}).get("containerStatuses") or ()
    entry: dict[str, Any] = next((c for c in found if c.get("name") == names.CONTAINER), {})
    ended = (entry.get(kind, {}).get("terminated") for kind in ("state", "lastState"))
    return next((end for end in ended if end), None)


def notes(events: list[dict[str, Any]], ended: dict[str, Any] | None = None) -> tuple[str, ...]:
    """Reason and message of the newest warnings that still hold, newest first, each text once.

    Also why the kubelet killed a container that ended; what it said of containers before that one is left out.
    """
    ordered = sorted(events, key=_moment, reverse=True)
    newest: dict[str, str] = {}
    for event in ordered:
        newest.setdefault(str(event.get("reason")), _moment(event))
    said = (event for event in ordered if _holds(event, newest, (ended or {}).get("startedAt")))
    # Both are optional.
    texts = (": ".join(filter(None, (event.get("reason"), event.get("message")))) for event in said)
    return tuple(dict.fromkeys(filter(None, texts)))[:_NOTES]


def _holds(event: dict[str, Any], newest: dict[str, str], started: str | None) -> bool:
    reason, moment = event.get("reason"), _moment(event)
    if reason in ("Killing", "Unhealthy"):
        # Readiness probes fail whenever no model is loaded: only what ends a container counts.
        words = event.get("message") or ""
        fatal = "failed liveness probe" in words or "Liveness probe failed" in words
        return fatal and started is not None and moment >= started.removesuffix("Z")
    if event.get("type", "Warning") != "Warning":
        return False
    return all(moment >= newest.get(step, "") for step, over in _OVERCOME.items() if reason in over)


def _moment(event: dict[str, Any]) -> str:
    series = event.get("series") or {}
    metadata = event.get("metadata") or {}
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    # Fractions of a second only where the scheduler writes: without them all compare as text.
    return str(last or metadata.get("creationTimestamp") or "").partition(".")[0].removesuffix("Z")
