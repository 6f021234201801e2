"""Which layers of a model each rank of a pipeline holds: one rule for the operator, the download and the engine."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """The layers [start, end) of `total`, of one rank."""

    start: int
    end: int
    total: int

    @property
    def first(self) -> bool:
        """Holds the embedding."""
        return self.start == 0

    @property
    def last(self) -> bool:
        """Holds norm and head."""
        return self.end == self.total

    def __str__(self) -> str:
        return f"{self.start}-{self.end - 1}"


class TooFewLayersError(ValueError):
    """Fewer layers than ranks."""


def split(total: int, world_size: int, memory_limits: Sequence[int | None] = ()) -> tuple[Span, ...]:
    """The spans of all ranks, by rank: rank n-1 holds the first layers, rank 0 the last ones.

    `memory_limits`: bytes that each rank's container may use, by rank; None where there is no limit. Empty: not known.
    Where all limits are known and differ, each rank gets its share of the layers, at least one. Otherwise all get as
    many; rank 0 also has norm and head, so where it is uneven the higher ranks get one more.

    Raises:
        TooFewLayersError: fewer layers than ranks.
    """
    if total < world_size:
        raise TooFewLayersError(
            f"the model has {total} layers, too few for a pipeline of {world_size} ranks: use at most {total} runners"
        )
    counts = _counts(total, world_size, memory_limits)
    found = []
    for rank in range(world_size):
        start = sum(counts[rank + 1 :])
        found.append(Span(start, start + counts[rank], total))
    return tuple(found)


def _counts(total: int, world_size: int, memory_limits: Sequence[int | None]) -> list[int]:
    limits = [limit for limit in memory_limits if limit]
    if len(limits) != world_size:
        limits = [1] * world_size
    counts, whole = [1] * world_size, sum(limits)
    # One at a time to whoever is furthest behind its share: no layer is lost or given twice by rounding.
    for _ in range(total - world_size):
        behind = [total * limit - count * whole for limit, count in zip(limits, counts, strict=True)]
        rank = max(range(world_size), key=lambda rank: (behind[rank], rank))
        counts[rank] += 1
    return counts
