"""From how many requests on a second lane pays: measured with the group at hand, in its warm-up.

Two half batches keep both halves of a pipeline busy, but each of them reads the weights anew. What weighs more depends
on the model, on the machines and on the network between them.
"""

import time
from collections.abc import Callable

from .scheduler import SECOND_LANE_ROWS, Row, Scheduler

SIZES = (4, 8, 16, 32)
"""Requests at once that are tried, until two lanes are faster."""
_TOKENS = 4
_REPEATS = 2
_BUDGET_SECONDS = 1.0
"""A warm-up is also a part of every restart: where steps are slow the second lane stays where it usually pays."""
_PROMPT = (0, 0)


def crossover(
    drive: Callable[[Scheduler], object], max_rows: int, ahead: int, clock: Callable[[], float] = time.monotonic
) -> int:
    """Requests from which on two lanes are faster than one; more than any group holds where they never are.

    Args:
        drive: serves all that a scheduler has, to its end.
        max_rows: requests that the group computes at once.
        ahead: frames under way at a time.
        clock: seconds.
    """
    deadline = clock() + _BUDGET_SECONDS
    slower = 1
    for size in SIZES:
        if size > max_rows:
            break
        one, two = (_best(drive, size, lanes, ahead, deadline, clock) for lanes in (1, 2))
        if one is None or two is None:
            return max(SECOND_LANE_ROWS, slower + 1)
        if two < one:
            return (slower + size + 1) // 2 if slower > 1 else size
        slower = size
    return max(SECOND_LANE_ROWS, slower + 1)


def _best(
    drive: Callable[[Scheduler], object],
    size: int,
    lanes: int,
    ahead: int,
    deadline: float,
    clock: Callable[[], float],
) -> float | None:
    """Seconds that some requests take; None: there is no time left to find out."""
    best = None
    for _ in range(_REPEATS):
        if clock() > deadline:
            return None
        scheduler = Scheduler(size, frozenset(), lanes=lanes, ahead=ahead, second_lane_rows=lanes)
        for uid in range(1, size + 1):
            scheduler.submit(Row(uid, _PROMPT, _TOKENS, ignore_eos=True, remember=False))
        began = clock()
        drive(scheduler)
        took = clock() - began
        best = took if best is None else min(best, took)
    return best
