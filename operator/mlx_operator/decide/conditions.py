"""The one way conditions are written: all of them, each as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.status import Condition, Status

from .messages import one_line


@dataclass(frozen=True, slots=True)
class Fact:
    """What is to be said of one condition."""

    status: Literal["True", "False", "Unknown"]
    reason: Reason
    message: str


def conclude(
    facts: Mapping[ConditionType, Fact], old: Status, generation: int, stamp: datetime
) -> tuple[Condition, ...]:
    """All conditions, in the order a person reads them; `lastTransitionTime` moves only when `status` flips."""
    return tuple(_condition(kind, facts[kind], old.condition(kind), generation, stamp) for kind in ConditionType)


def _condition(kind: ConditionType, fact: Fact, old: Condition | None, generation: int, stamp: datetime) -> Condition:
    message = one_line(fact.message) or fact.reason.meaning
    same = old is not None and old.status == fact.status
    said = (fact.reason, message, generation)
    if old is not None and same and (old.reason, old.message, old.observed_generation) == said:
        return old
    return Condition(
        type=kind,
        status=fact.status,
        reason=fact.reason,
        message=message,
        last_transition_time=old.last_transition_time if old is not None and same else stamp,
        observed_generation=generation,
    )
