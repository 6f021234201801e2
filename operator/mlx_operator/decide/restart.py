"""When the group starts again after a failure: budget, back-off, jitter."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.status import GroupFailure, Status

from .messages import clock_time
from .picture import Clock, assigned
from .spec import RestartRules

JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from a failure. `at` None: nothing starts again by itself."""

    restarts: int
    at: datetime | None


def counts(reason: Reason) -> bool:
    """Whether a failure with this reason spends the budget."""
    return reason.retry in (Retry.RESTART, Retry.WAIT, Retry.NONE)


def decide(reason: Reason, restarts: int, rules: RestartRules, seed: str, clock: Clock, free: int = 0) -> Verdict:
    """Judge a failure after `restarts` counted ones and `free` that spent no budget: both wait longer each time.

    `seed` (uid and epoch) makes the jitter repeatable.
    """
    if reason.retry is Retry.NEVER:
        return Verdict(restarts, None)
    if not counts(reason):
        return Verdict(restarts, _after(clock, backoff(free, rules, seed)))
    if restarts >= rules.max_restarts:
        return Verdict(restarts, None)
    return Verdict(restarts + 1, _after(clock, backoff(restarts, rules, seed)))


def _after(clock: Clock, delay: float) -> datetime:
    return clock.stamp + timedelta(seconds=math.ceil(delay))


def free_of_late(history: Sequence[GroupFailure], rules: RestartRules, now: datetime) -> int:
    """How many failures within the window spent no budget, of those that history holds."""
    return sum(not counts(failure.reason) and now - failure.time < rules.reset_after for failure in history)


def backoff(restarts: int, rules: RestartRules, seed: str) -> float:
    """Seconds before the next restart: none for the first of a window, then doubling from `initial` up to `max`."""
    if restarts == 0:
        return 0.0
    delay: float = min(rules.max, rules.initial * 2.0 ** min(restarts - 1, 60))
    fraction = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") / 0xFFFFFFFF
    return delay * (1 - JITTER + 2 * JITTER * fraction)


def spent(status: Status, rules: RestartRules, clock: Clock) -> int:
    """Restarts since the last sustained Ready; where there are any, the end of the window is a time to plan at."""
    ready = status.condition(ConditionType.READY)
    if status.restarts == 0 or ready is None or ready.status != "True":
        return status.restarts
    return 0 if clock.passed(ready.last_transition_time + rules.reset_after) else status.restarts


def open_failure(status: Status) -> GroupFailure | None:
    """The last failure, while no newer epoch was given to the pods: its evidence may still improve."""
    last = status.history[0] if status.history else None
    if last is None or last.epoch < status.epoch - 1:
        return None
    return last if last.epoch == status.epoch or not assigned(status) else None


def final_failure(status: Status) -> GroupFailure | None:
    """The failure after which nothing starts by itself: it opened no other epoch."""
    last = status.history[0] if status.history else None
    return last if last is not None and last.epoch == status.epoch else None


def budget_raised(status: Status, rules: RestartRules) -> bool:
    """The budget that the last failure found spent is not spent by the rules of now."""
    final = final_failure(status)
    return final is not None and counts(final.reason) and status.restarts < rules.max_restarts


def next_step(status: Status, rules: RestartRules) -> str:
    """What comes after the last failure, for messages."""
    if not status.history:
        return ""
    last, final = status.history[0], final_failure(status)
    if final is not None:
        if final.reason.retry is Retry.NEVER:
            return "no restart: trying again cannot help"
        return f"no restart: the budget of {rules.max_restarts} is spent"
    kind = f"restart {status.restarts}/{rules.max_restarts}" if counts(last.reason) else "restart (free of budget)"
    if status.next_restart_at is not None:
        return f"{kind} at {clock_time(status.next_restart_at)}"
    return f"{kind} under way in epoch {status.epoch}"
