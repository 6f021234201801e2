"""Which beginnings of prompts are kept for reuse: decided here on rank 0, obeyed by every rank. No MLX here.

An entry is the sequence of tokens whose keys and values the ranks hold. A prompt reuses its longest common prefix with
any entry. Copies of such a cache on every rank would drift apart, because their shards differ in size.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_POSITIONS = 16
"""Less is not worth an entry, nor a copy: a forward pass costs as much as about twenty positions."""
_MIB = 1024 * 1024
_DEFAULT_PART = 16
_DEFAULT_BYTES = 256 * _MIB
_DEFAULT_MOST_BYTES = 1024 * _MIB


def budget(asked: int | None, memory_limits: Iterable[int | None]) -> int:
    """Bytes of each rank for entries: what the spec says (0: none), or a part of the least memory limit of a rank."""
    if asked is not None:
        return asked
    limits = [limit for limit in memory_limits if limit is not None]
    return min(min(limits) // _DEFAULT_PART, _DEFAULT_MOST_BYTES) if limits else _DEFAULT_BYTES


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `positions` tokens of an entry are those of the prompt."""

    entry: int
    positions: int


@dataclass(frozen=True, slots=True)
class Change:
    """What every rank does to remember a sequence: keep it as `entry`, after it has forgotten others."""

    entry: int
    forget: tuple[int, ...] = ()


class PrefixCache:
    """Entries, least recently used first to go. `capacity`: positions of all entries together; 0 keeps nothing."""

    def __init__(self, capacity: int = 0) -> None:
        self._capacity = capacity
        self._ordered: list[tuple[tuple[int, ...], int]] = []
        """Sorted by tokens: whatever shares most with a prompt stands beside the place of the prompt."""
        self._used: dict[int, tuple[int, ...]] = {}
        """By entry, least recently used first."""
        self._positions = 0
        self._made = 0

    @property
    def positions(self) -> int:
        """Positions that all entries hold together."""
        return self._positions

    def resize(self, capacity: int) -> None:
        """Set the capacity, before the first entry: it follows from the size of a position, which a warm-up shows."""
        self._capacity = capacity

    def find(self, prompt: Sequence[int]) -> Hit | None:
        """The entry to begin a prompt with. The last token is always computed: its logits are wanted."""
        wanted = tuple(prompt[:-1])
        best = max(self._neighbours(wanted), key=lambda hit: hit.positions, default=None)
        if best is None or best.positions < MIN_POSITIONS:
            return None
        self._touch(best.entry)
        return best

    def remember(self, tokens: Sequence[int]) -> Change | None:
        """Keep a sequence; None if it is not worth it, too large, or known already."""
        new = tuple(tokens)
        if not MIN_POSITIONS <= len(new) <= self._capacity:
            return None
        neighbours = list(self._neighbours(new))
        for hit in neighbours:
            if hit.positions == len(new):
                self._touch(hit.entry)
                return None
        # What it continues is part of it.
        forget = [hit.entry for hit in neighbours if hit.positions == len(self._used[hit.entry])]
        for entry in forget:
            self._forget(entry)
        while self._positions + len(new) > self._capacity:
            oldest = next(iter(self._used))
            self._forget(oldest)
            forget.append(oldest)
        self._made += 1
        self._used[self._made] = new
        bisect.insort(self._ordered, (new, self._made))
        self._positions += len(new)
        return Change(self._made, tuple(forget))

    def _neighbours(self, tokens: tuple[int, ...]) -> list[Hit]:
        at = bisect.bisect_left(self._ordered, (tokens, 0))
        beside = self._ordered[max(0, at - 1) : at + 1]
        return [Hit(entry, _common(tokens, other)) for other, entry in beside]

    def _touch(self, entry: int) -> None:
        self._used[entry] = self._used.pop(entry)

    def _forget(self, entry: int) -> None:
        tokens = self._used.pop(entry)
        del self._ordered[bisect.bisect_left(self._ordered, (tokens, entry))]
        self._positions -= len(tokens)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of their common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
