"""Which changes of status are worth a write now, and which wait for the next one.

Every write costs the API server and everybody who watches. What decides something (an epoch, a failure, a cause, Ready
and Stalled) is written at once; what only informs (a step on the way to Ready, progress, a node's name, wording) rides
along with it, or follows when nothing was written for a while: what a person would see for a moment only is never
written. Ready and Running are one state in status, so a busy instance causes no writes at all.
"""

from datetime import datetime, timedelta
from typing import Any

from mlx_operator_api.conditions import ConditionType, Retry
from mlx_operator_api.runner import ENDED, RunnerState
from mlx_operator_api.status import Condition, RunnerStatus, Status

from .picture import Clock

QUIET_SECONDS = 5.0
MOVING_SECONDS = 30.0
"""The same while tasks are sent that lead on: what they lead to is what to write."""
_STEPS = frozenset(
    {ConditionType.SCHEDULED, ConditionType.MODEL_AVAILABLE, ConditionType.CONNECTED, ConditionType.LOADED}
)
"""What is reached, one after the other, on the way to Ready. No action waits until they are written."""


def worth_writing(old: Status, new: Status, clock: Clock, *, moving: bool = False) -> Status:
    """The status to store: `new`, or `old` while the difference can wait. `moving`: this plan sends tasks."""
    if old == new or not old.conditions or _hard(old) != _hard(new):
        return new
    quiet = MOVING_SECONDS if moving else QUIET_SECONDS
    return new if clock.passed(_last_stamp(old) + timedelta(seconds=quiet)) else old


def _last_stamp(status: Status) -> datetime:
    """The newest time in status: its last write was not before."""
    times = [c.last_transition_time for c in status.conditions]
    times += [record.since for record in status.runners if record.since is not None]
    times += [record.last_failure.time for record in status.runners if record.last_failure is not None]
    times += [failure.time for failure in status.history]
    return max(times)


def _hard(status: Status) -> tuple[Any, ...]:
    soft = {"brief", "runners", "conditions", "ready_runners", "runners_ready", "model", "restarts"}
    rest = status.model_dump(exclude=soft)
    conditions = [_hard_condition(condition) for condition in status.conditions]
    # The commit is told to the other ranks once it is written: a restarted operator must find it.
    model = status.model
    revisions = (model.revision, model.adapter) if model is not None else None
    return rest, revisions, conditions, [_hard_runner(record) for record in status.runners]


def _hard_condition(condition: Condition) -> tuple[Any, ...]:
    trouble = condition.reason if condition.reason.retry is not Retry.NONE else None
    passing = condition.type in _STEPS and trouble is None
    return condition.type, None if passing else condition.status, condition.observed_generation, trouble


def _hard_runner(record: RunnerStatus) -> tuple[Any, ...]:
    state = record.state if record.state in ENDED else None
    failed = state is RunnerState.FAILED
    return record.rank, record.pod_uid, record.epoch, record.incarnation, record.last_failure, failed
