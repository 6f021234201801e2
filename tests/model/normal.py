"""Normal forms: what no decision depends on is made the same, so that situations that are equal become equal.

Nothing is left out that `plan()` or the transition table looks at, but for the words of messages.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Literal

from mlx_operator.decide.failure import pending
from mlx_operator.decide.picture import assigned
from mlx_operator.decide.restart import open_failure
from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.runner import ENDED, RunnerState, TaskName
from mlx_operator_api.status import Condition, GroupFailure, LastFailure, RunnerStatus, Status
from mlx_operator_api.tasks import RunnerReport, TaskOutcome, TaskPhase

from .state import T0

LATER = T0 + timedelta(seconds=3)
"""A restart that is not due yet."""
LONG_AGO = T0 - timedelta(hours=2)
"""Since when Ready was True where it was so for longer than `resetAfter`."""
WORDS = "words"
_OVER_STATES = (*ENDED, RunnerState.SHUTTING_DOWN)
_STOPPING = (RunnerState.SHUTTING_DOWN, RunnerState.SHUTDOWN)
_OVER = LastFailure(epoch=1, time=T0, state=RunnerState.PENDING, reason=Reason.ENGINE_CRASHED, message=WORDS)
"""A failure of an epoch that is over."""


def shifted(epoch: int, by: int) -> int:
    """An epoch counted from another one; those long over become one, and none stays none."""
    return max(1, epoch - by) if epoch > 0 else 0


def failure(found: LastFailure | None, by: int = 0) -> LastFailure | None:
    """A rank's failure."""
    if found is None:
        return None
    return LastFailure(
        epoch=shifted(found.epoch, by), time=T0, state=_failed_in(found), reason=found.reason, message=WORDS
    )


def _failed_in(found: LastFailure) -> RunnerState:
    """Of what ended a runner only matters whether it was told to stop; of what did not, the state it is still in."""
    if found.reason in (Reason.TASK_REJECTED, Reason.MODEL_UNREACHABLE):
        return found.state
    return RunnerState.SHUTDOWN if found.state in _STOPPING else RunnerState.READY


def report(found: RunnerReport, by: int = 0, order: Sequence[int] | None = None) -> RunnerReport:
    """A report; its rank and its incarnation stand where it stands. `order`: the ranks' new numbers."""
    peer, waiting = found.peer, found.waiting_for
    if order is not None:
        peer = None if peer is None else order[peer]
        waiting = tuple(sorted(order[rank] for rank in waiting))
    before = found.predecessor
    if before is not None and before.epoch in range(found.epoch or 1):
        # What became of an older epoch is told; nothing follows from it any more.
        before = None
    if before is not None:
        before = before.model_copy(
            update={
                "incarnation": "",
                "epoch": shifted(before.epoch, by),
                "state": RunnerState.SHUTDOWN if before.state in _STOPPING else RunnerState.READY,
                "last_report": T0,
                "failure": failure(before.failure, by),
            }
        )
    return found.model_copy(
        update={
            "rank": 0,
            "incarnation": "",
            "seq": 1,
            "epoch": shifted(found.epoch, by),
            "since": T0,
            "tasks": tuple(_outcome(task, by, over=found.state in _OVER_STATES) for task in found.tasks),
            "failure": failure(found.failure, by),
            "peer": peer,
            "waiting_for": waiting,
            "predecessor": before,
        }
    )


def heard(found: RunnerReport) -> RunnerReport:
    """A report in its normal form, as the operator takes it: of an engine that ends, only what it was told since."""
    if found.state not in _OVER_STATES:
        return found
    kept = (task for task in found.tasks if task.name is TaskName.SHUTDOWN or task.phase is TaskPhase.REJECTED)
    return found.model_copy(update={"tasks": tuple(kept)})


def _outcome(found: TaskOutcome, by: int, *, over: bool) -> TaskOutcome:
    if over and found.name is not TaskName.SHUTDOWN and found.phase is not TaskPhase.REJECTED:
        # How far the tasks of an engine came that ends is asked by nobody; that they are known keeps them off.
        return TaskOutcome(
            name=found.name, epoch=shifted(found.epoch, by), attempt=found.attempt, phase=TaskPhase.COMPLETE
        )
    rejection = found.rejection
    if rejection is not None:
        rejection = rejection.model_copy(
            update={
                "why": WORDS, "state": RunnerState.PENDING, "task_epoch": 0, "epoch": 0, "world_size": 1, "rank": 0,
                "group": "absent", "accepted_in": (), "tasks_accepted": (),
            }
        )  # fmt: skip
    words = None if found.message is None else WORDS
    return found.model_copy(update={"epoch": shifted(found.epoch, by), "rejection": rejection, "message": words})


def status(found: Status, by: int = 0, order: Sequence[int] | None = None, now: datetime = T0) -> Status:
    """A status made at `now`; uids and incarnations of its runners stand in the places."""
    # Once the next epoch has begun, nothing depends on more of a failure than how it is retried.
    closed = assigned(found) and open_failure(found) is None and pending(found) is None
    runners = _records(found, by, closed=closed)
    history = [_group(entry, by, order, closed=closed or number > 0) for number, entry in enumerate(found.history)]
    if order is not None:
        moved = {order[record.rank]: record for record in runners}
        runners = [
            moved[rank].model_copy(update={"rank": rank, "pod": runners[rank].pod, "node": _node(moved[rank], rank)})
            for rank in sorted(moved)
        ]
    due = found.next_restart_at
    return found.model_copy(
        update={
            "brief": (),
            "epoch": shifted(found.epoch, by),
            "next_restart_at": None if due is None else (LATER if due > now else T0),
            "history": tuple(history),
            "runners": tuple(runners),
            "conditions": tuple(_condition(condition, closed=closed) for condition in found.conditions),
        }
    )


def _records(found: Status, by: int, *, closed: bool) -> list[RunnerStatus]:
    records = [_record(record, by) for record in found.runners]
    over = [record.last_failure is not None and record.last_failure.epoch < record.epoch for record in records]
    any_over = closed and any(over)
    return [
        # Who failed before is a word too; that somebody did, is kept.
        record.model_copy(update={"last_failure": _OVER})
        if was or (any_over and record.last_failure is None)
        else record
        for record, was in zip(records, over, strict=True)
    ]


def _record(found: RunnerStatus, by: int) -> RunnerStatus:
    return found.model_copy(
        update={
            "pod_uid": None,
            "incarnation": None,
            "since": None if found.since is None else T0,
            "epoch": shifted(found.epoch, by),
            "layers": None,
            "note": None,
            "progress": None,
            "last_failure": failure(found.last_failure, by),
        }
    )


def _node(record: RunnerStatus, rank: int) -> str | None:
    return None if record.node is None else node(rank, "ab".index(record.node[-1]))


def node(rank: int, number: int) -> str:
    """The name of one of a rank's two nodes."""
    return f"n{rank}{'ab'[number]}"


def _group(found: GroupFailure, by: int, order: Sequence[int] | None, *, closed: bool) -> GroupFailure:
    known = {"epoch": shifted(found.epoch, by), "time": T0, "message": WORDS}
    if closed:
        return found.model_copy(update={**known, "reason": _kind(found.reason), "rank": None, "consequences": ()})
    rank, taken = found.rank, found.consequences
    if order is not None:
        rank = None if rank is None else order[rank]
        taken = tuple(sorted(order[other] for other in taken))
    return found.model_copy(update={**known, "rank": rank, "consequences": taken})


def _kind(reason: Reason) -> Reason:
    """One reason for all that are retried alike."""
    match reason.retry:
        case Retry.FREE:
            return Reason.POD_DELETED
        case Retry.NEVER:
            return Reason.INSUFFICIENT_MEMORY
        case _:
            return Reason.ENGINE_CRASHED


def _condition(found: Condition, *, closed: bool) -> Condition:
    settled = found.type is ConditionType.READY and found.last_transition_time <= LONG_AGO
    # Reasons of progress are words: nothing follows from them, and they may be told late.
    reason = Reason.UNKNOWN if found.reason.retry is Retry.NONE else found.reason
    told = _kind(reason) if closed and reason is not Reason.UNKNOWN else reason
    return _condition_of(found.type, found.status, told, LONG_AGO if settled else T0)


@cache
def _condition_of(
    kind: ConditionType, status: Literal["True", "False", "Unknown"], reason: Reason, since: datetime
) -> Condition:
    return Condition(
        type=kind, status=status, reason=reason, message=WORDS, last_transition_time=since, observed_generation=1
    )


def long_ready(found: Status) -> Status | None:
    """The same status once Ready was True for longer than `resetAfter`; None where it is not, or already so."""
    ready = found.condition(ConditionType.READY)
    if ready is None or ready.status != "True" or ready.last_transition_time == LONG_AGO:
        return None
    aged = ready.model_copy(update={"last_transition_time": LONG_AGO})
    conditions = tuple(aged if condition is ready else condition for condition in found.conditions)
    return found.model_copy(update={"conditions": conditions})
