"""Choosing the next token of each row, on rank 0 only.

A row's token depends on nothing but its own logits, parameters, seed, position and earlier tokens: its random key is
the pair (seed, position), and every path below treats a row the same way alone and in company. Rows that ask for
nothing beyond temperature and top_p pay nothing for those that do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

_WORD = 0xFFFFFFFF
_LEAST_TOP_P = 1e-9
"""The most likely token always stays."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """How a row is sampled; the names and meanings are OpenAI's, those of vLLM and mlx-lm beyond."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    """Tokens less likely than this share of the most likely one are left out."""
    seed: int = 0
    bias: tuple[tuple[int, float], ...] = ()
    """Added to logits, by token id."""
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    """Over prompt and answer; presence and frequency look at the answer only."""
    logprobs: int | None = None
    """How many alternatives are reported beside each token; None: no logprobs at all."""

    @property
    def greedy(self) -> bool:
        """Temperature 0: the most likely token, no randomness."""
        return self.temperature <= 0

    @property
    def adjusted(self) -> bool:
        """Whether the logits of single tokens change."""
        return bool(self.bias) or self.repetition != 1 or self.presence != 0 or self.frequency != 0

    @property
    def cut(self) -> bool:
        """Whether the less likely tokens are left out."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one token and its alternatives, most likely first: natural logarithms under the model's own distribution."""

    token: float
    top: tuple[tuple[int, float], ...]


class Constraint(Protocol):
    """What restricts the next token of a row: a grammar."""

    @property
    def active(self) -> bool:
        """Whether it restricts the next token."""

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""

    def allowed(self, vocabulary: int) -> Any:
        """A numpy array of booleans, one for each token id."""

    def accept(self, token: int) -> None:
        """This token was chosen."""


@dataclass(slots=True)
class RowSampler:
    """The state of one row's sampling. It is a pure function of the request and the tokens that it was given."""

    parameters: Parameters = field(default_factory=Parameters)
    position: int = 0
    """Index of the next token in prompt + answer."""
    seen: frozenset[int] = frozenset()
    """Tokens of the prompt; only needed for the repetition penalty."""
    constraint: Constraint | None = None
    counts: dict[int, int] = field(default_factory=dict)
    logprobs: Logprobs | None = None
    """Of the token that was chosen last."""

    @classmethod
    def of(cls, parameters: Parameters, prompt: Sequence[int], constraint: Constraint | None = None) -> "RowSampler":
        """At the beginning of an answer."""
        seen = frozenset(prompt) if parameters.repetition != 1 else frozenset[int]()
        return cls(parameters, len(prompt), seen, constraint)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete with the last token, though it is no end-of-sequence token."""
        return self.constraint is not None and self.constraint.ended

    def accept(self, token: int) -> None:
        """This token was chosen."""
        self.position += 1
        if self.parameters.adjusted:
            self.counts[token] = self.counts.get(token, 0) + 1
        if self.constraint is not None:
            self.constraint.accept(token)


def key(row: RowSampler) -> tuple[int, int]:
    """The random key of a row: its seed, folded to 32 bits, and its position."""
    seed = row.parameters.seed
    return (seed ^ (seed >> 32)) & _WORD, row.position & _WORD


def sample(logits: Any, rows: Sequence[RowSampler]) -> list[int]:
    """The next token of each row, told to the row as well; `logits` is (rows, vocabulary)."""
    shaped = _constrained(_adjusted(logits, rows), rows)
    best = mx.argmax(shaped, axis=-1)
    if not all(row.parameters.greedy for row in rows):
        greedy = mx.array([row.parameters.greedy for row in rows])
        best = mx.where(greedy, best, _draw(shaped.astype(mx.float32), rows))
    tokens = cast(list[int], best.tolist())
    _report(logits, rows, tokens)
    for row, token in zip(rows, tokens, strict=True):
        row.accept(token)
    return tokens


# -- what is likely
def _adjusted(logits: Any, rows: Sequence[RowSampler]) -> Any:
    """Bias and penalties, token by token of the rows that ask."""
    if not any(row.parameters.adjusted for row in rows):
        return logits
    logits = logits.astype(mx.float32)
    vocabulary = logits.shape[-1]
    for index, row in enumerate(rows):
        if not row.parameters.adjusted:
            continue
        found = _touched(row, vocabulary)
        if not found:
            continue
        ids = mx.array(found)
        logits[index, ids] = _penalized(logits[index, ids], row, found)
    return logits


def _touched(row: RowSampler, vocabulary: int) -> list[int]:
    """Tokens whose logits change."""
    ids = {token for token, _ in row.parameters.bias} | row.counts.keys() | row.seen
    return sorted(token for token in ids if token < vocabulary)


def _penalized(values: Any, row: RowSampler, ids: Sequence[int]) -> Any:
    parameters, bias = row.parameters, dict(row.parameters.bias)
    values = values + mx.array([bias.get(token, 0.0) for token in ids])
    if parameters.repetition != 1:
        repeated = mx.array([token in row.seen or token in row.counts for token in ids])
        factor = parameters.repetition
        values = mx.where(repeated, mx.where(values > 0, values / factor, values * factor), values)
    counts = [row.counts.get(token, 0) for token in ids]
    return values - mx.array([parameters.presence * (n > 0) + parameters.frequency * n for n in counts])


def _constrained(logits: Any, rows: Sequence[RowSampler]) -> Any:
    """Only what the grammars of the rows allow."""
    bound = [(i, row.constraint) for i, row in enumerate(rows) if row.constraint is not None and row.constraint.active]
    if not bound:
        return logits
    logits = logits.astype(mx.float32)
    allowed = mx.array(np.stack([constraint.allowed(logits.shape[-1]) for _, constraint in bound]))
    index = mx.array([index for index, _ in bound])
    logits[index] = mx.where(allowed, logits[index], -mx.inf)
    return logits


# -- what is drawn
def _draw(logits: Any, rows: Sequence[RowSampler]) -> Any:
    temperatures = mx.array([1.0 if row.parameters.greedy else row.parameters.temperature for row in rows])
    scaled = logits / temperatures[:, None]
    if any(row.parameters.cut for row in rows):
        scaled = _cut(scaled, [row.parameters for row in rows])
    keys = mx.array([key(row) for row in rows], dtype=mx.uint32)
    return mx.vmap(lambda row, row_key: mx.random.categorical(row, key=row_key))(scaled, keys)


def _cut(scaled: Any, rows: Sequence[Parameters]) -> Any:
    """Mask all but the top_k most likely tokens, and of them all but the smallest set whose probabilities reach top_p.

    Also those below min_p of the most likely one.
    """
    vocabulary = scaled.shape[-1]
    top_k = mx.array([row.top_k if 0 < row.top_k < vocabulary else vocabulary for row in rows])[:, None]
    top_p = mx.array([max(row.top_p, _LEAST_TOP_P) for row in rows])[:, None]
    least = mx.log(mx.array([row.min_p for row in rows]))[:, None]
    ordered = -mx.sort(-scaled, axis=-1)
    highest = ordered[:, :1]
    ordered = mx.where(mx.arange(vocabulary) < top_k, ordered, -mx.inf)
    probabilities = mx.softmax(ordered, axis=-1, precise=True)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) & (ordered > -mx.inf)
    threshold = mx.min(mx.where(kept, ordered, mx.inf), axis=-1, keepdims=True)
    # Rows that keep everything stay exactly as they are: alone they would not come here at all.
    everything = (top_p >= 1) & (top_k >= vocabulary)
    return mx.where(((scaled >= threshold) | everything) & (scaled >= highest + least), scaled, -mx.inf)


# -- what is told
def _report(logits: Any, rows: Sequence[RowSampler], tokens: Sequence[int]) -> None:
    """Logprobs, for the rows that ask."""
    asked = [(i, row.parameters.logprobs) for i, row in enumerate(rows) if row.parameters.logprobs is not None]
    if not asked:
        return
    table = logits[mx.array([index for index, _ in asked])].astype(mx.float32)
    table = table - mx.logsumexp(table, axis=-1, keepdims=True)
    count = min(max(count for _, count in asked), table.shape[-1])
    best = mx.argpartition(-table, kth=max(count - 1, 0), axis=-1)[:, :count]
    found = zip(
        asked,
        cast(list[list[int]], best.tolist()),
        cast(list[list[float]], mx.take_along_axis(table, best, axis=-1).tolist()),
        cast(list[float], table[mx.arange(len(asked)), mx.array([tokens[index] for index, _ in asked])].tolist()),
        strict=True,
    )
    for (index, wanted), ids, values, own in found:
        pairs = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        rows[index].logprobs = Logprobs(own, tuple(pairs[:wanted]))
