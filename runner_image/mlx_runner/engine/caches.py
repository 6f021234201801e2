"""A model's caches, of which a stage of a pipeline keeps only some.

A model's code asks its caches for more than its layers' keys and values: the masks of all layers follow from one
cache of each kind. So a stage gives the code a full list, in which every cache that is not here is stood for by one
of the same kind that is, or by a shadow: a cache of that kind whose entries are one number wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_operator_api.layers import Span

from .blocks import blocks


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Of one layer: bytes a position, bytes besides, and the window that bounds the positions."""

    position: int
    fixed: int
    window: int | None

    def bytes(self, positions: int) -> int:
        """Of one sequence; caches grow in blocks."""
        held = positions if self.window is None else min(positions, self.window)
        return self.fixed + self.position * blocks(held)


def merge(caches: list[list[Any]]) -> list[Any]:
    """Caches of several sequences as one batch, layer by layer."""
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


def size(cache: Any) -> int:
    """Bytes that a cache has allocated."""
    return sum(array.nbytes for _, array in tree_flatten(cache.state) if isinstance(array, mx.array))


def window(cache: Any) -> int | None:
    """Positions that a cache keeps at most; None without a bound."""
    parts = getattr(cache, "caches", None)
    if parts is not None:
        bounds = [window(part) for part in parts]
        return None if None in bounds else max(b for b in bounds if b is not None)
    bound = getattr(cache, "max_size", None)
    return bound if isinstance(bound, int) else None


def _kind(cache: Any) -> tuple[Any, ...]:
    """What makes two empty caches behave alike."""
    facts: list[tuple[str, Any]] = []
    for name, value in sorted(vars(cache).items()):
        if isinstance(value, list | tuple):
            facts.append((name, tuple(_kind(part) if hasattr(part, "state") else None for part in value)))
        elif isinstance(value, int | float | str | None):
            facts.append((name, value))
    return (type(cache), *facts)


class CachePlan:
    """Which caches a stage keeps, and how it stands for the others."""

    def __init__(self, caches: Sequence[Any], cache_of: Sequence[int | None], part: Span) -> None:
        held = {cache_of[layer] for layer in range(part.start, part.end)}
        self.held = sorted(index for index in held if index is not None)
        self._shadows: list[int] = []
        by_kind = {_kind(caches[index]): place for place, index in reversed(list(enumerate(self.held)))}
        self._places = []
        for index, cache in enumerate(caches):
            kind = _kind(cache)
            if index not in held and kind not in by_kind:
                by_kind[kind] = len(self.held) + len(self._shadows)
                self._shadows.append(index)
            self._places.append(self.held.index(index) if index in held else by_kind[kind])

    def take(self, caches: Sequence[Any]) -> list[Any]:
        """The caches of one sequence that this stage keeps, out of those for the whole model."""
        return [caches[index] for index in (*self.held, *self._shadows)]

    def spread(self, kept: Sequence[Any]) -> list[Any]:
        """A cache for every place of the model's list."""
        return [kept[place] for place in self._places]

    def advance(self, kept: Sequence[Any], rows: int, positions: int) -> None:
        """After a forward pass: the shadows have seen these positions too."""
        for cache in kept[len(self.held) :]:
            _advance(cache, rows, positions)


def _advance(cache: Any, rows: int, positions: int) -> None:
    if hasattr(cache, "caches"):
        for part in cache.caches:
            _advance(part, rows, positions)
    elif hasattr(cache, "update_and_fetch"):
        nothing = mx.zeros((rows, 1, positions, 1))
        cache.update_and_fetch(nothing, nothing)
    elif hasattr(cache, "advance"):
        cache.advance(positions)
