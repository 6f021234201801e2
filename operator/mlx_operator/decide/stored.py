"""The stored status: read as well as it can be, and finished the same way by every rule."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.status import MAX_HISTORY, GroupFailure, LastFailure, RunnerStatus, Status

from .brief import brief
from .conditions import Fact, conclude
from .observed import Manifest
from .picture import Clock

_Failure = TypeVar("_Failure", GroupFailure, LastFailure)


def read(instance: Manifest) -> Status:
    """The status of an instance.

    One that this release cannot read (a newer or a much older one wrote it) keeps its epoch: engines of it may run, and
    the next epoch has to be above theirs. It keeps the evidence too: each failure that can be read.
    """
    raw = instance.get("status") or {}
    try:
        return Status.model_validate(raw)
    except ValidationError:
        return _rescued(raw)


def _rescued(raw: Manifest) -> Status:
    epoch = raw.get("epoch")
    found = (_failure(GroupFailure, entry) for entry in _entries(raw, "history"))
    history = tuple(failure for failure in found if failure is not None)[:MAX_HISTORY]
    runners = (_runner(entry) for entry in _entries(raw, "runners"))
    known = epoch if isinstance(epoch, int) and epoch > 0 else 0
    return Status(
        # What followed from the last failure is not known any more: it is over, and the next epoch is a new one.
        epoch=max(known, history[0].epoch + 2) if history else known,
        history=history,
        runners=tuple(runner for runner in runners if runner is not None),
    )


def _entries(raw: Manifest, name: str) -> list[dict[str, Any]]:
    found = raw.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _runner(raw: dict[str, Any]) -> RunnerStatus | None:
    """A rank with its last failure; whatever else was recorded of it proves nothing any more."""
    failure = raw.get("lastFailure")
    found = _failure(LastFailure, failure) if isinstance(failure, dict) else None
    try:
        return RunnerStatus.model_validate({"rank": raw.get("rank"), "last_failure": found})
    except ValidationError:
        return None


def _failure(model: type[_Failure], raw: dict[str, Any]) -> _Failure | None:
    """A failure, without fields that are not known; its message tells what a reason that is not known would."""
    known = {field.alias or name for name, field in model.model_fields.items()}
    entry = {name: value for name, value in raw.items() if name in known}
    if entry.get("reason") not in list(Reason):
        entry["reason"] = Reason.UNKNOWN
    try:
        return model.model_validate(entry)
    except ValidationError:
        return None


def finish(status: Status, facts: Mapping[ConditionType, Fact], old: Status, generation: int, clock: Clock) -> Status:
    """Add what follows from the rest: conditions, then the brief."""
    conditions = conclude(facts, old, generation, clock.stamp)
    status = status.revised(conditions=conditions, observed_generation=generation)
    return status.revised(brief=brief(status))
