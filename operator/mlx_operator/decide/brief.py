"""`status.brief`: the state for a person, from the rest of the status and nothing else."""

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import ENDED, RunnerState
from mlx_operator_api.status import Condition, RunnerStatus, Status

from . import remedies
from .messages import listed, one_line, without_who

_PLAIN = (Reason.SUSPENDED, *(reason for reason in Reason if not reason.remedy))
"""Reasons whose words the headline has already."""


def brief(status: Status) -> tuple[str, ...]:
    """Headline; one line a rank, the cause first; what to do."""
    ready = status.condition(ConditionType.READY)
    if ready is None:
        return ()
    why, do = remedies.split(ready.message, ready.reason)
    lines = [_headline(status, ready)]
    if _tells_why(status, ready):
        lines.append(f"why: {why}")
    cause = _cause(status)
    ranks = sorted(status.runners, key=lambda record: (record.rank != cause, record.rank))
    lines += [_rank_line(status, record) for record in ranks]
    if ready.status != "True" and do:
        lines += [f"do: {step}" for step in (_before(why, status, ready), do) if step]
    return tuple(one_line(line) for line in lines)


def _before(why: str, status: Status, ready: Condition) -> str:
    """What the last failure asks for, where it asks for the budget as well."""
    if ready.reason is not Reason.RESTART_BUDGET_EXHAUSTED or not status.history:
        return ""
    return remedies.split(why, status.history[0].reason)[1]


def _failing(status: Status) -> bool:
    condition = status.condition(ConditionType.RUNNER_FAILED)
    return condition is not None and condition.status == "True"


def _cause(status: Status) -> int | None:
    return status.history[0].rank if _failing(status) and status.history else None


def _headline(status: Status, ready: Condition) -> str:
    if ready.status == "True":
        return f"Ready: {ready.message}"
    if ready.reason is Reason.SUSPENDED:
        return f"Suspended: {ready.message}"
    if _stalled(status):
        return f"Stalled: {ready.reason}{_after(status, ready)}"
    reconciling = status.condition(ConditionType.RECONCILING)
    words = reconciling.message if reconciling is not None else ready.reason
    if ready.reason in (Reason.SUSPENDED, *_problems(status)):
        words = ready.reason
    after = _after(status, ready)
    if after and status.next_restart_at is None:
        after = f" (restarting{after})"
    return f"Not ready: {words}{after}"


def _problems(status: Status) -> tuple[Reason, ...]:
    """Reasons of what is in the way though no runner failed."""
    kinds = (ConditionType.SCHEDULED, ConditionType.MODEL_AVAILABLE)
    found = (status.condition(kind) for kind in kinds)
    return tuple(c.reason for c in found if c is not None and c.status == "False" and c.reason.remedy)


def _after(status: Status, ready: Condition) -> str:
    if not _failing(status) or not status.history:
        return ""
    last = status.history[0]
    if last.reason is ready.reason and (status.next_restart_at is None or _stalled(status)):
        return f" on rank {last.rank}"
    return f" after {last.reason} on rank {last.rank}"


def _stalled(status: Status) -> bool:
    stalled = status.condition(ConditionType.STALLED)
    return stalled is not None and stalled.status == "True"


def _tells_why(status: Status, ready: Condition) -> bool:
    """Whether there are words of what is in the way that no rank's line has."""
    if ready.status == "True" or ready.reason in _PLAIN:
        return False
    failures = [record.last_failure.message for record in status.runners if record.last_failure is not None]
    failed = [record for record in status.runners if record.state is RunnerState.FAILED]
    return not failed or not any(ready.message.startswith(failure) for failure in failures)


def _taken_along(status: Status, record: RunnerStatus) -> bool:
    """Whether the last failure ended this rank, and nothing of its own."""
    if not _failing(status) or not status.history or record.state not in ENDED:
        return False
    last = status.history[0]
    return record.epoch == last.epoch and record.rank in last.consequences


def _rank_line(status: Status, record: RunnerStatus) -> str:
    name = f"rank {record.rank}/{len(status.runners)} {record.pod or '?'}" + (
        f" on {record.node}" if record.node else ""
    )
    failure = record.last_failure
    details = [f"{record.state} (consequence)" if _taken_along(status, record) else f"{record.state}"]
    if record.state is RunnerState.FAILED and failure is not None:
        details.append(without_who(failure.message))
    else:
        known = record.layers is not None and record.state is not RunnerState.PENDING
        details += [f"layers {record.layers}" if known else "", record.progress or ""]
        if failure is not None:
            details.append(f"last failure {failure.reason} in epoch {failure.epoch}")
    return f"{name}: {listed(*details)}"
