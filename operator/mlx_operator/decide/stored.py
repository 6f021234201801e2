"""The stored status: read as well as it can be, and finished the same way by every rule."""

from collections.abc import Mapping

from pydantic import ValidationError

from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.status import Status

from .brief import brief
from .conditions import Fact, conclude
from .observed import Manifest
from .picture import Clock


def read(instance: Manifest) -> Status:
    """The status of an instance.

    One that this release cannot read (a newer one wrote it) keeps its epoch: engines of it may run, and the next
    epoch has to be above theirs.
    """
    raw = instance.get("status") or {}
    try:
        return Status.model_validate(raw)
    except ValidationError:
        epoch = raw.get("epoch")
        return Status(epoch=epoch if isinstance(epoch, int) and epoch > 0 else 0)


def finish(status: Status, facts: Mapping[ConditionType, Fact], old: Status, generation: int, clock: Clock) -> Status:
    """Add what follows from the rest: conditions, then the brief."""
    conditions = conclude(facts, old, generation, clock.stamp)
    status = status.model_copy(update={"conditions": conditions, "observed_generation": generation})
    return status.model_copy(update={"brief": brief(status)})
