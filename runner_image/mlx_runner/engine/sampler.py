"""Choosing the next token of each row, on rank 0 only.

A row's token depends on nothing but its own logits, parameters, seed and position: its random key is the pair
(seed, position), and every path below treats a row the same way alone and in company.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

_WORD = 0xFFFFFFFF
_LEAST_TOP_P = 1e-9
"""The most likely token always stays."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How one row is sampled. `position` is the index of the new token in prompt + answer."""

    temperature: float
    top_p: float
    seed: int
    position: int

    @property
    def greedy(self) -> bool:
        """Temperature 0: the most likely token, no randomness."""
        return self.temperature <= 0


def key(choice: Choice) -> tuple[int, int]:
    """The random key of a row: its seed, folded to 32 bits, and its position."""
    seed = choice.seed
    return (seed ^ (seed >> 32)) & _WORD, choice.position & _WORD


def sample(logits: Any, choices: Sequence[Choice]) -> list[int]:
    """The next token of each row; `logits` is (rows, vocabulary)."""
    best = mx.argmax(logits, axis=-1)
    if all(choice.greedy for choice in choices):
        return cast(list[int], best.tolist())
    drawn = _draw(logits.astype(mx.float32), choices)
    greedy = mx.array([choice.greedy for choice in choices])
    return cast(list[int], mx.where(greedy, best, drawn).tolist())


def _draw(logits: Any, choices: Sequence[Choice]) -> Any:
    temperatures = mx.array([1.0 if choice.greedy else choice.temperature for choice in choices])
    scaled = logits / temperatures[:, None]
    if any(choice.top_p < 1 for choice in choices):
        scaled = _nucleus(scaled, choices)
    keys = mx.array([key(choice) for choice in choices], dtype=mx.uint32)
    return mx.vmap(lambda row, row_key: mx.random.categorical(row, key=row_key))(scaled, keys)


def _nucleus(scaled: Any, choices: Sequence[Choice]) -> Any:
    """Mask all but the smallest set of most likely tokens whose probabilities sum up to top_p."""
    top_p = mx.array([max(choice.top_p, _LEAST_TOP_P) for choice in choices])[:, None]
    ordered = -mx.sort(-scaled, axis=-1)
    probabilities = mx.softmax(ordered, axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    threshold = mx.min(mx.where(before < top_p, ordered, mx.inf), axis=-1, keepdims=True)
    # Rows that keep everything stay exactly as they are: alone they would not come here at all.
    return mx.where((scaled >= threshold) | (top_p >= 1), scaled, -mx.inf)
