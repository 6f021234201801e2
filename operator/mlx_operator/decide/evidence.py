"""What went wrong with one rank of an epoch: from its own report, its pod, its node, or its silence."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from mlx_operator_api.conditions import Reason
from mlx_operator_api.deadlines import OPERATOR_GRACE_SECONDS
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import RunnerReport, TaskPhase

from . import downloads, ends, progress
from . import picture as pictures
from .messages import clock_time, listed, one_line
from .picture import Picture, Rank
from .pods import PodView, Terminated

_GRACE = timedelta(seconds=OPERATOR_GRACE_SECONDS)
_DEADLINES = {
    RunnerState.PENDING: ("shutdown", Reason.RUNNER_UNREACHABLE, "did not accept CreateRunner"),
    RunnerState.CONNECTING: ("connect", Reason.CONNECT_TIMEOUT, "not connected"),
    RunnerState.LOADING: ("load", Reason.LOAD_TIMEOUT, "not loaded"),
    RunnerState.WARMING_UP: ("warmup", Reason.WARMUP_TIMEOUT, "not warmed up"),
}
_TAINTED = "DeletionByTaintManager"
"""Why the node's taints end a pod: all that is known of a lost node by who may not read nodes."""
_NAMED = re.compile(r"\brank ([0-9]+)\b")
_WEAK, _VAGUE, _GENERIC, _SPECIFIC = 4, 3, 2, 1
_WAITS = (Reason.CONNECT_TIMEOUT, Reason.WARMUP_TIMEOUT)
"""What a rank reports that waited for another one in vain, if it names one."""
_STRENGTH = {
    Reason.PEER_LOST: _WEAK,
    Reason.RUNNER_UNREACHABLE: _VAGUE,
    Reason.CONNECT_TIMEOUT: _VAGUE,
    Reason.TASK_REJECTED: _VAGUE,
    Reason.CONTAINER_CRASHED: _GENERIC,
    Reason.POD_DELETED: _GENERIC,
    Reason.EVICTED: _GENERIC,
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """One failure of one rank, as observed."""

    rank: int
    reason: Reason
    what: str
    """What and evidence, without who."""
    state: RunnerState
    time: datetime
    """When it happened, as far as known: orders the failures of one epoch."""
    exit_code: int | None = None
    signal: str | None = None
    diagnostics: tuple[str, ...] = ()
    accused: int | None = None
    """The rank that a PeerLost names, or a timeout that waited for it."""
    tentative: bool = False
    """News that is due may explain it: the deletion of a pod may be watched after its SIGTERM was reported, and a rank
    that is waited for has a word of its own a moment later."""

    @property
    def strength(self) -> int:
        """Lower is nearer to a root cause."""
        return strength(self.reason)

    @property
    def specific(self) -> bool:
        """It names its own cause, whatever happened elsewhere."""
        return self.strength == _SPECIFIC

    @property
    def weak(self) -> bool:
        """A consequence of something else, or possibly one: others are heard first."""
        return self.strength == _WEAK or self.tentative


def strength(reason: Reason) -> int:
    """How near a reason is to a root cause: 1 names it itself, 4 is known to be a consequence."""
    return _STRENGTH.get(reason, _SPECIFIC)


def nearest(found: Sequence[Evidence]) -> Evidence:
    """The evidence nearest to a root cause; the word of a rank that others only wait for goes before theirs."""
    best = min(found, key=lambda e: (e.strength, e.time, e.rank))
    if best.reason not in _WAITS:
        return best
    accused = {e.accused for e in found if e.reason in _WAITS}
    own = [e for e in found if e.rank in accused and e.strength == best.strength and _waits_for_nobody(e)]
    return min(own, key=lambda e: (e.time, e.rank), default=best)


def _waits_for_nobody(found: Evidence) -> bool:
    return found.reason not in _WAITS or found.accused is None


def better(new: Evidence, old_reason: Reason, old_rank: int | None, found: Sequence[Evidence] = ()) -> bool:
    """Whether new evidence replaces the recorded cause: stronger, and not somebody else's later trouble.

    A timeout that waited for another rank also yields to the equally strong word of that one.
    """
    old = strength(old_reason)
    if new.rank == old_rank and outranks(new.reason, old_reason):
        return True
    if old_reason in _WAITS and _waits_for_nobody(new) and new.strength == old:
        return any(e.rank == old_rank and e.accused == new.rank for e in found)
    return new.strength < old and (old > _GENERIC or (old == _GENERIC and new.rank == old_rank))


def outranks(new: Reason, old: Reason) -> bool:
    """Whether a reason of the same rank is why another one was seen: the kernel took memory back, so an engine died."""
    return new is Reason.OUT_OF_MEMORY and old is Reason.ENGINE_CRASHED


def explains(new: Evidence, known: LastFailure) -> bool:
    """Whether the rank's pod tells why its supervisor was told to stop."""
    told = known.reason is Reason.CONTAINER_CRASHED and known.state in (RunnerState.SHUTTING_DOWN, RunnerState.SHUTDOWN)
    return told and new.reason in (Reason.POD_DELETED, Reason.EVICTED, Reason.NODE_LOST)


def completes(new: Evidence, known: LastFailure) -> bool:
    """Whether the kubelet has told by now how a container ended that its successor was heard of first."""
    same = new.reason is known.reason and new.state is known.state
    return same and known.exit_code is None and new.exit_code is not None


def diagnose(rank: Rank, epoch: int, picture: Picture, *, ended_by_us: bool) -> Evidence | None:
    """The best evidence that a rank of the epoch failed, or None. `ended_by_us`: its shutdown was ordered."""
    found = list(_all(rank, epoch, picture, ended_by_us))
    best = min(found, key=lambda e: e.strength, default=None)
    return best and next((e for e in found if outranks(e.reason, best.reason)), best)


def _all(rank: Rank, epoch: int, picture: Picture, ended_by_us: bool) -> Iterator[Evidence]:
    for evidence in (
        _node(rank, picture),
        _pod(rank, epoch, picture, ended_by_us),
        _report(rank, epoch, ended_by_us),
        _container(rank, epoch, picture),
    ):
        if evidence is not None:
            yield evidence
    late = None if ended_by_us or picture.changing else _deadline(rank, epoch, picture)
    late = late or _silence(rank, picture)
    if late is not None:
        yield late


def _node(rank: Rank, picture: Picture) -> Evidence | None:
    pod, node = rank.pod, rank.record.node
    gone = pod is None or pod.uid != rank.record.pod_uid
    lost = rank.node_lost if not gone else pictures.node_lost(node, False, picture.observed)
    if not lost:
        return None
    known = picture.observed.nodes.get(node or "")
    since = f" since {clock_time(known.since)}" if known and known.since else ""
    what = f"node {node} is NotReady{since}" if known else f"node {node} is gone"
    reason = f" ({known.reason})" if known and known.reason else ""
    return _make(rank, Reason.NODE_LOST, what + reason, (known and known.since) or picture.clock.now)


def _pod(rank: Rank, epoch: int, picture: Picture, ended_by_us: bool) -> Evidence | None:
    pod, record, now = rank.pod, rank.record, picture.clock.now
    if pod is None or pod.uid != record.pod_uid:
        return _make(rank, Reason.POD_DELETED, f"its pod (uid {(record.pod_uid or '?')[:8]}) is gone", now)
    disrupted = pod.disruption != "" and _ends(rank, pod, epoch, picture, ended_by_us)
    if not (pod.over or pod.deleting or disrupted):
        return None
    cordoned = _cordoned(pod, picture)
    if pod.disruption.startswith(_TAINTED) and not rank.alive and not _well(pod, picture):
        return _make(rank, Reason.NODE_LOST, one_line(f"node {pod.node} is lost: {pod.disruption}", 400), now)
    if pod.over or pod.disruption:
        told = (pod.disruption or listed(pod.reason, pod.message)).strip(" .")
        words = f"its pod was evicted: {one_line(told, 400)}" if told else f"its pod is over: phase {pod.phase}"
        return _make(rank, Reason.EVICTED, listed(words, cordoned), now)
    return _make(rank, Reason.POD_DELETED, listed("its pod is being deleted", cordoned), now)


def _ends(rank: Rank, pod: PodView, epoch: int, picture: Picture, ended_by_us: bool) -> bool:
    """Somebody else than the operator ends a pod that nobody deletes: what DisruptionTarget explains, and is not."""
    told = rank.report is not None and rank.report.draining
    state = pictures.effective(rank, epoch)
    stopped = state in (RunnerState.SHUTTING_DOWN, RunnerState.SHUTDOWN) and not ended_by_us
    return told or stopped or pod.container.running is None or _silence(rank, picture) is not None


def _well(pod: PodView, picture: Picture) -> bool:
    """Its node is known to be Ready: who tainted it had another reason than its loss."""
    known = picture.observed.nodes.get(pod.node or "")
    return picture.settings.watch_nodes and known is not None and known.ready


def _cordoned(pod: PodView, picture: Picture) -> str:
    """What a drain does first."""
    known = picture.observed.nodes.get(pod.node or "")
    return f"node {pod.node} is cordoned" if known is not None and known.cordoned else ""


def _report(rank: Rank, epoch: int, ended_by_us: bool) -> Evidence | None:
    report = rank.in_epoch(epoch)
    if report is None:
        return None
    if report.state is RunnerState.FAILED and report.failure is not None:
        return _from_failure(rank, report.failure, _accused(report.failure.reason, report, report.failure.message))
    if report.state in (RunnerState.SHUTTING_DOWN, RunnerState.SHUTDOWN) and not ended_by_us:
        what = "its supervisor was told to stop (SIGTERM) although nobody deletes its pod"
        told = _make(rank, Reason.CONTAINER_CRASHED, what, report.since, report.state)
        return replace(told, tentative=True)
    return None


def _accused(reason: Reason, report: RunnerReport | None, message: str) -> int | None:
    """The rank that a consequence blames: the report's word, else the one that the message names."""
    if reason not in (Reason.PEER_LOST, *_WAITS):
        return None
    if report is not None and report.peer is not None:
        return report.peer
    if reason is Reason.WARMUP_TIMEOUT:
        return None
    if report is not None and report.waiting_for:
        return report.waiting_for[0]
    named = _NAMED.search(message)
    return int(named[1]) if named else None


def _from_failure(rank: Rank, failure: LastFailure, accused: int | None) -> Evidence:
    state = failure.state
    named = any(name in failure.message for name in RunnerState)
    what = failure.message if named else f"{failure.message}, in {state}"
    return Evidence(
        rank=rank.rank,
        reason=failure.reason,
        what=one_line(what, 800),
        state=state,
        time=failure.time,
        exit_code=failure.exit_code,
        signal=failure.signal,
        diagnostics=failure.diagnostics,
        accused=accused,
        tentative=failure.reason in _WAITS and accused is not None,
    )


def _container(rank: Rank, epoch: int, picture: Picture) -> Evidence | None:
    pod, report, record = rank.pod, rank.report, rank.record
    if pod is None or pod.uid != record.pod_uid:
        return None
    replaced = report is not None and report.incarnation != record.incarnation
    down = pod.container.terminated is not None or (pod.container.waiting != "" and pod.container.last is not None)
    if not replaced and not down:
        return None
    before = report.predecessor if report is not None and replaced else None
    ended = ends.latest(pod, record)
    oom = ended is not None and ended.reason == "OOMKilled"
    if before is not None and before.epoch == epoch:
        if before.failure is not None and not oom:
            return _from_failure(rank, before.failure, _accused(before.failure.reason, None, before.failure.message))
        state = before.state
    else:
        state = _last_state(rank)
    return _ended(rank, pod, ended, state, picture.clock.now)


def _ended(rank: Rank, pod: PodView, ended: Terminated | None, state: RunnerState, now: datetime) -> Evidence:
    if ended is None:
        return _make(rank, Reason.CONTAINER_CRASHED, f"container ended in {state}", now, state)
    end = ends.of(ended, pod, rank.notes)
    return Evidence(
        rank=rank.rank,
        reason=end.reason,
        what=listed(f"container ended with {end.code} in {state}", end.details),
        state=state,
        time=ended.finished or now,
        exit_code=ended.exit_code,
        signal=end.signal,
        diagnostics=(end.log,) if end.log else (),
    )


def _deadline(rank: Rank, epoch: int, picture: Picture) -> Evidence | None:
    if not rank.alive:
        return None
    state, since = pictures.effective(rank, epoch), rank.record.since
    if rank.record.state is not state or since is None:
        return None
    download = rank.outcome(TaskName.DOWNLOAD_MODEL)
    if state is RunnerState.IDLE and download is not None and download.phase is TaskPhase.RUNNING:
        name, reason, what = "download", Reason.DOWNLOAD_TIMEOUT, "the model's files are not there"
    elif state in _DEADLINES:
        name, reason, what = _DEADLINES[state]
    else:
        return _rejected(rank, epoch, picture)
    limit = picture.wanted.deadline(name)
    end = downloads.latest_end(picture, rank, since) if name == "download" else since + limit
    if not picture.clock.passed(end + _GRACE):
        return None
    report = rank.in_epoch(epoch)
    shown = listed(rank.record.progress or "", progress.awaited(report))
    text = f"{what} within {limit.total_seconds():g} s" + (f" ({shown})" if shown else "")
    late = _make(rank, reason, f"{text}, and its supervisor did not end it", picture.clock.now, state)
    return replace(late, accused=_accused(reason, report, ""))


def _rejected(rank: Rank, epoch: int, picture: Picture) -> Evidence | None:
    """A task that keeps being rejected although the table accepts it: the two sides differ; start again."""
    noted = rank.record.last_failure
    report = rank.in_epoch(epoch)
    if noted is None or noted.reason is not Reason.TASK_REJECTED or noted.epoch != epoch or report is None:
        return None
    if report.state is not noted.state or not picture.clock.passed(noted.time + _GRACE):
        return None
    return _make(rank, Reason.TASK_REJECTED, noted.message.partition(": ")[2], noted.time, report.state)


def _silence(rank: Rank, picture: Picture) -> Evidence | None:
    view, clock = rank.view, picture.clock
    if rank.pod is None or view.connected or pictures.outdated(rank.pod, picture):
        return None
    last = view.received or picture.settings.started
    limit = picture.wanted.deadline("unreachable")
    limit = limit if view.received else pictures.meeting(limit)
    if last is None or not clock.passed(last + limit):
        return None
    why = f": {view.error}" if view.error else ""
    heard = f"silent since {clock_time(view.received)}" if view.received else "never heard by this operator"
    return _make(rank, Reason.RUNNER_UNREACHABLE, f"its supervisor cannot be reached, {heard}{why}", last)


def _make(rank: Rank, reason: Reason, what: str, time: datetime, state: RunnerState | None = None) -> Evidence:
    return Evidence(rank=rank.rank, reason=reason, what=what, state=state or _last_state(rank), time=time)


def _last_state(rank: Rank) -> RunnerState:
    """The state of a rank before it failed: better evidence is about that moment, too."""
    record, failure = rank.record, rank.record.last_failure
    failed = record.state is RunnerState.FAILED and failure is not None and failure.epoch == record.epoch
    return failure.state if failed and failure is not None else record.state
