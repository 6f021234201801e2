"""The scheduler's and the kubelet's own words about pods that do not run; no requests while all run."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import CORE_EVENTS
from mlx_operator.logs import decision
from mlx_operator.observe.runners import address
from mlx_operator.observe.shelf import Key, Manifest
from mlx_operator.observe.store import Store

PATIENCE_SECONDS = 5.0
PERIOD_SECONDS = 10.0
LONGEST_PERIOD_SECONDS = 60.0
"""For a pod of which nothing new was said for long."""
SPACING_SECONDS = 0.1
"""Between two requests: a cluster that is full has many waiting pods."""
_NOTES = 3


class PodEvents:
    """Reads the Warning events of waiting pods, each pod at most once per period, all of them at a bounded rate."""

    def __init__(
        self, kube: Kube, store: Store, *, changed: Callable[[Key], None], now: Callable[[], datetime]
    ) -> None:
        self._kube = kube
        self._store = store
        self._changed = changed
        self._now = now
        self._due: dict[str, datetime] = {}
        self._period: dict[str, float] = {}
        self._some = asyncio.Event()

    def pod_changed(self, uid: str) -> None:
        """Begin or end to ask about a pod."""
        pod = self._store.pod(uid)
        if pod is None or not waits(pod):
            self._forget(uid)
            self._store.set_warnings(uid, ())
        elif uid not in self._due:
            created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
            self._due[uid] = max(self._now(), created + timedelta(seconds=PATIENCE_SECONDS))
            self._some.set()

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
            await self._read(uid)
            if uid in self._due:
                self._due[uid] = self._now() + timedelta(seconds=self._period.get(uid, PERIOD_SECONDS))
            await asyncio.sleep(SPACING_SECONDS)

    async def _read(self, uid: str) -> None:
        pod = self._store.pod(uid)
        if pod is None:
            self._forget(uid)
            return
        try:
            events, _ = await self._kube.list(
                CORE_EVENTS, pod["metadata"]["namespace"], fields=f"involvedObject.uid={uid},type=Warning"
            )
        except KubeError as error:
            decision("events of a waiting pod cannot be read", level=logging.WARNING, error=error, pod_uid=uid)
            return
        if uid not in self._due:  # it runs by now
            return
        touched = self._store.set_warnings(uid, notes(events))
        for key in touched:
            self._changed(key)
        known = self._period.get(uid, PERIOD_SECONDS / 2)
        self._period[uid] = PERIOD_SECONDS if touched else min(LONGEST_PERIOD_SECONDS, known * 2)

    def _forget(self, uid: str) -> None:
        self._due.pop(uid, None)
        self._period.pop(uid, None)


def waits(pod: Manifest) -> bool:
    """The pod is meant to run and its container does not."""
    if pod["metadata"].get("deletionTimestamp") or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return False
    return address(pod) is None


def notes(events: list[dict[str, Any]]) -> tuple[str, ...]:
    """Reason and message of the newest events, newest first, each text once."""
    ordered = sorted(events, key=_moment, reverse=True)
    texts = (f"{event.get('reason')}: {event.get('message')}" for event in ordered)
    return tuple(dict.fromkeys(texts))[:_NOTES]


def _moment(event: dict[str, Any]) -> str:
    series = event.get("series") or {}
    metadata = event.get("metadata") or {}
    last = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return str(last or metadata.get("creationTimestamp") or "")
