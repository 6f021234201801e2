"""What must hold in every state and in every decision."""

from collections.abc import Iterable

from mlx_operator.decide import evidence, restart
from mlx_operator.decide.picture import assigned
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import SERVING, RunnerState
from mlx_operator_api.status import MAX_HISTORY, GroupFailure, RunnerStatus, Status

from . import normal
from .state import BASE, Place, State, Tables


def paid(old: Status, new: Status) -> int:
    """Restarts that a decision spends: counted by the model, from the failures that it records."""
    if not new.history:
        return 0
    before, after = old.history[0] if old.history else None, new.history[0]
    if before is None or before.epoch != after.epoch:
        return _cost(after, new)
    return _cost(after, new) - _cost(before, old)


def _cost(failure: GroupFailure, status: Status) -> int:
    return int(restart.counts(failure.reason) and failure.epoch < status.epoch)


def sustained(status: Status) -> bool:
    """Whether the group was Ready for so long that the budget is full again."""
    ready = status.condition(ConditionType.READY)
    return ready is not None and ready.status == "True" and ready.last_transition_time == normal.LONG_AGO


def of_decision(old: Status, new: Status, budget: int) -> str | None:
    """The promise that a step from one status to the next breaks."""
    if new.epoch < old.epoch:
        return f"the epoch goes back from ~{old.epoch}~ to ~{new.epoch}~"
    if new.restarts > budget:
        return f"budget overspent: restarts={new.restarts} of {budget}"
    kept = {failure.epoch for failure in new.history}
    lost = [failure for failure in old.history[: MAX_HISTORY - 1] if failure.epoch not in kept]
    if lost:
        return f"a recorded failure is lost: {lost[0].reason} of epoch ~{lost[0].epoch}~"
    if old.history and old.history[0].epoch == new.history[0].epoch:
        before, after = old.history[0].reason, new.history[0].reason
        if evidence.strength(after) > evidence.strength(before):
            return f"the cause {before} of epoch ~{old.history[0].epoch}~ is replaced by {after}, which says less"
    for record in old.runners:
        now = new.runner(record.rank)
        if now.epoch < record.epoch:
            return f"{{{record.rank}}} goes back to epoch ~{now.epoch}~"
        if record.last_failure is not None and now.last_failure is None:
            return f"the last failure of {{{record.rank}}} is lost: {record.last_failure.reason}"
        if record.state is RunnerState.FAILED and _covered(record, now):
            return f"the failure of {{{record.rank}}} is covered by the rejection of a task that came too late"
    if new.epoch > old.epoch and assigned(old) and old.epoch not in kept:
        return f"epoch ~{old.epoch}~ ends without a recorded failure"
    return None


def _covered(old: RunnerStatus, new: RunnerStatus) -> bool:
    before, after = old.last_failure, new.last_failure
    if before is None or after is None or before.reason is Reason.TASK_REJECTED or new.epoch != old.epoch:
        return False
    return after.reason is Reason.TASK_REJECTED and after.epoch == before.epoch


def of_state(state: State, places: Iterable[Place], tables: Tables, budget: int) -> str | None:
    """The promise that does not hold in a state."""
    if state.spent > budget:
        return f"budget overspent: {state.spent} restarts were paid for, the budget is {budget}"
    status, serving = tables.statuses[state.status], set()
    for rank, place in enumerate(places):
        found = _of_place(rank, place, status)
        if found is not None:
            return found
        if place.process is not None and not place.isolated:
            report = tables.reports[place.process.report]
            if report.state in SERVING:
                serving.add(report.epoch)
    return f"two epochs serve: {_listed(serving)}" if len(serving) > 1 else None


def _of_place(rank: int, place: Place, status: Status) -> str | None:
    engines = place.process.engines if place.process is not None else ()
    if len(engines) > 1:
        return f"{{{rank}}} has {len(engines)} engines, of epochs {_listed(engines)}"
    if set(engines) & set(place.zombies):
        return f"epoch ~{engines[0]}~ has two engines of {{{rank}}}, one of them on a lost node"
    if engines and (engines[0] > BASE or status.runner(rank).epoch < engines[0]):
        return f"{{{rank}}} has an engine of epoch ~{engines[0]}~ that the status does not know"
    return None


def _listed(epochs: Iterable[int]) -> str:
    return ", ".join(f"~{epoch}~" for epoch in sorted(epochs))
