"""What the group computes next: admission, prefill, decode steps. Rank 0 only; no MLX here.

One lane: all rows decode together. Per frame at most one batch of short prompts, one chunk of a long one, and one
decode step; so a long prompt delays the others by one chunk at a time, and a short one joins at the next frame.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from . import frames
from .sampler import Logprobs, RowSampler

CHUNK_TOKENS = 256
"""Positions that one frame prefills at most."""
_LEAST_CHUNK = 64
"""Of a long prompt, beside a batch of short ones."""

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(slots=True)
class Row:
    """One sequence: a request, or the warm-up. `uid` is unique within the engine.

    A request that goes on after its engine was lost begins in the middle: its prompt then ends with the `given` tokens
    of the answer that exist already. They count towards `max_tokens`, and are not emitted again.
    """

    uid: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampler: RowSampler = field(default_factory=RowSampler)
    """How its next token is chosen; only carried here."""
    ignore_eos: bool = False
    given: int = 0
    generated: int = 0
    prefilled: int = 0
    done: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.given < self.max_tokens or self.given >= len(self.prompt):
            what = f"{self.given} tokens given, {self.max_tokens} at most, a prompt of {len(self.prompt)} with them"
            raise ValueError(f"nothing to generate for row {self.uid}: {what}")


@dataclass(frozen=True, slots=True)
class Emission:
    """What one turn brought a row: a token, its end, or both."""

    uid: int
    token: int | None = None
    finish: FinishReason | None = None
    logprobs: Logprobs | None = None


class Scheduler:
    """Plans frames. The caller runs every planned frame in order, and gives the tokens of its step to `take`."""

    def __init__(self, max_rows: int, eos: frozenset[int]) -> None:
        self._max_rows = max_rows
        self._eos = eos
        self._waiting: deque[Row] = deque()
        self._prefilling: Row | None = None
        self._rows: list[Row] = []
        self._next: list[int] = []
        self._step_planned = False

    @property
    def choices(self) -> tuple[RowSampler, ...]:
        """How the rows of the planned step are sampled, in its order."""
        return tuple(row.sampler for row in self._rows)

    def submit(self, row: Row) -> None:
        """Take a row in; it waits for a place."""
        self._waiting.append(row)

    def cancel(self, uid: int) -> list[Emission]:
        """End a row wherever it is; its memory is freed by the next frame. Unknown rows are ignored."""
        for row in self._waiting:
            if row.uid == uid:
                self._waiting.remove(row)
                return [Emission(uid, finish="cancelled")]
        candidates = [*self._rows, *([self._prefilling] if self._prefilling else [])]
        for row in candidates:
            if row.uid == uid and not row.done:
                row.done = True
                return [Emission(uid, finish="cancelled")]
        return []

    def take(self, tokens: Sequence[int]) -> list[Emission]:
        """The result of the planned step: one token for each of its rows."""
        self._step_planned = False
        emissions = []
        for row, token in zip(self._rows, tokens, strict=True):
            if row.done:
                continue
            row.generated += 1
            finish = self._finish(row, token)
            row.done = finish is not None
            emissions.append(Emission(row.uid, token, finish, row.sampler.logprobs))
        self._next = list(tokens)
        return emissions

    def _finish(self, row: Row, token: int) -> FinishReason | None:
        if (token in self._eos and not row.ignore_eos) or row.sampler.ended:
            return "stop"
        return "length" if row.given + row.generated >= row.max_tokens else None

    def plan(self) -> tuple[frames.Operation, ...]:
        """The operations of the next frame; empty when there is nothing to do, or a step is still under way."""
        if self._step_planned:
            return ()
        operations = [*self._release(), *self._prefill()]
        if self._rows:
            operations.append(frames.Step(tuple(self._next)))
            self._step_planned = True
        return tuple(operations)

    def _release(self) -> list[frames.Operation]:
        operations: list[frames.Operation] = []
        kept = [index for index, row in enumerate(self._rows) if not row.done]
        if len(kept) < len(self._rows):
            operations.append(frames.Keep(tuple(kept)))
            self._rows = [self._rows[index] for index in kept]
            self._next = [self._next[index] for index in kept]
        if self._prefilling is not None and self._prefilling.done:
            operations.append(frames.Drop(self._prefilling.uid))
            self._prefilling = None
        return operations

    def _prefill(self) -> list[frames.Operation]:
        operations: list[frames.Operation] = []
        short = self._admit()
        if short:
            operations.append(frames.PrefillBatch(tuple(row.uid for row in short), tuple(row.prompt for row in short)))
            for row in short:
                self._join(row)
        if self._prefilling is not None:
            budget = CHUNK_TOKENS - frames.area([row.prompt for row in short])
            operations += self._chunk(self._prefilling, max(_LEAST_CHUNK, budget))
        return operations

    def _admit(self) -> list[Row]:
        """Give free places to waiting rows, in order; a second long prompt waits for the first."""
        free = self._max_rows - len(self._rows) - (self._prefilling is not None)
        short: list[Row] = []
        for row in list(self._waiting):
            if free == 0:
                break
            if len(row.prompt) - 1 > CHUNK_TOKENS:
                if self._prefilling is not None:
                    continue
                self._prefilling = row
            elif frames.area([*(r.prompt for r in short), row.prompt]) <= CHUNK_TOKENS:
                short.append(row)
            else:
                break
            self._waiting.remove(row)
            free -= 1
        return short

    def _chunk(self, row: Row, budget: int) -> list[frames.Operation]:
        end = min(row.prefilled + budget, len(row.prompt) - 1)
        operations: list[frames.Operation] = [frames.PrefillChunk(row.uid, row.prompt[row.prefilled : end])]
        row.prefilled = end
        if end == len(row.prompt) - 1:
            operations.append(frames.Join(row.uid))
            self._prefilling = None
            self._join(row)
        return operations

    def _join(self, row: Row) -> None:
        self._rows.append(row)
        self._next.append(row.prompt[-1])
