"""What a report changes: which one is newer, and who has to plan again because of it."""

import re
from dataclasses import replace
from datetime import datetime
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from mlx_operator.decide.observed import RunnerView
from mlx_operator.observe.shelf import Manifest
from mlx_operator_api import names
from mlx_operator_api.runner import SERVING
from mlx_operator_api.tasks import RunnerReport


class Urgency(Enum):
    """How soon a change concerns the planner."""

    NONE = "none"
    """Heartbeats and counters: nothing follows from them."""
    LAZY = "lazy"
    """Ready and Running change with every request; status shows them with a hysteresis of many seconds."""
    AT_ONCE = "at once"


_SEQ = re.compile(rb'"seq":([0-9]+)')
_COUNTERS = {"seq": 0, "steps": 0, "active_requests": 0}


def receive(view: RunnerView, report: RunnerReport, now: datetime, *, stream: bool) -> tuple[RunnerView, Urgency]:
    """Merge a report into what is known; `stream` says that it came over the report stream.

    Of one incarnation the highest seq counts: a report may arrive twice, or late by another way. Which of two
    incarnations lives is told by the connection, never by their names, which hold the clock of a node: one stream is
    read at a time, and while it stands, the answer of another incarnation to a task is a late one.
    """
    known = view.report
    if known is None or known.incarnation != report.incarnation:
        later = known is None or stream or not view.connected
    else:
        later = report.seq > max(known.seq, view.repeated)
    merged = replace(
        view,
        report=report if later else known,
        repeated=0 if later else view.repeated,
        received=now,
        connected=view.connected or stream,
        error=None if stream else view.error,
        undecodable=False if stream else view.undecodable,
    )
    urgency = _difference(known, report) if later else Urgency.NONE
    if (merged.connected, merged.error, merged.undecodable) != (view.connected, view.error, view.undecodable):
        urgency = Urgency.AT_ONCE
    return merged, urgency


class LastLine:
    """The last line of a report stream. Most lines are heartbeats, which repeat it under a higher `seq`."""

    def __init__(self) -> None:
        self._digest = b""
        self._report: RunnerReport | None = None

    def keep(self, line: bytes, report: RunnerReport) -> None:
        """This line was decoded."""
        self._digest, seq = _split(line)
        self._report = report if seq == report.seq else None

    def repeated(self, line: bytes, view: RunnerView, now: datetime) -> RunnerView | None:
        """What is known after a heartbeat, which is not decoded; None: the line has to be."""
        if self._report is None or view.report is not self._report or view.error is not None or not view.connected:
            return None
        digest, seq = _split(line)
        if digest != self._digest or seq <= max(self._report.seq, view.repeated):
            return None
        return replace(view, received=now, repeated=seq)


def _split(line: bytes) -> tuple[bytes, int]:
    found = _SEQ.search(line)
    if found is None:
        return b"", -1
    return blake2b(line[: found.start()] + line[found.end() :], digest_size=16).digest(), int(found[1])


def lean(report: RunnerReport) -> RunnerReport:
    """Equal, in a seventh of the memory.

    Runners that are as far as each other share what is long, and all of them the set of fields, which pydantic makes
    anew for each report to remember which were given.
    """
    values = {name: _one_copy(value) if name in _LONG else value for name, value in report}
    return RunnerReport.model_construct(_FIELDS, **values)


@lru_cache(maxsize=1024)
def _one_copy(value: Any) -> Any:
    return value


_LONG = frozenset({"tasks", "model"})
_FIELDS = set(RunnerReport.model_fields)


def _difference(known: RunnerReport | None, report: RunnerReport) -> Urgency:
    if known is None:
        return Urgency.AT_ONCE
    old, new = known.model_copy(update=_COUNTERS), report.model_copy(update=_COUNTERS)
    if old == new:
        return Urgency.NONE
    if {old.state, new.state} <= SERVING and old.model_copy(update={"state": new.state, "since": new.since}) == new:
        return Urgency.LAZY
    return Urgency.AT_ONCE


def stranger(pod: Manifest, report: RunnerReport) -> str | None:
    """Why a report is not of this pod's runner (an address is soon used again), or None."""
    labels = pod["metadata"].get("labels") or {}
    uid, rank = labels.get(names.INSTANCE_UID_LABEL), labels.get(names.RANK_LABEL)
    if report.instance_uid != uid or str(report.rank) != rank:
        return f"another runner answers at the pod's address: rank {report.rank} of instance uid {report.instance_uid}"
    return None


def address(pod: Manifest | None) -> str | None:
    """The pod's IP while its runner container runs, else None."""
    if pod is None:
        return None
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return None
    containers = status.get("containerStatuses") or ()
    runs = any(entry.get("name") == names.CONTAINER and "running" in (entry.get("state") or {}) for entry in containers)
    ip = status.get("podIP")
    return str(ip) if runs and ip else None
