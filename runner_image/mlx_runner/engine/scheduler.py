"""What the group computes next: admission, prefill, decode steps. Rank 0 only; no MLX here.

Rows decode together in lanes. A pipeline of several stages has two: while one stage computes a step of the first lane,
another one computes a step of the second. A lane's frame holds at most one batch of short prompts, one chunk of a long
one, and one decode step; so a long prompt delays the others by one chunk at a time, and a short one joins at the next
frame.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from . import frames
from .blocks import blocks
from .prefix_cache import PrefixCache
from .sampler import Logprobs, RowSampler

CHUNK_TOKENS = 256
"""Positions that one frame prefills at most."""
FILL_TOKENS = 128
"""The same in a pipeline in which nothing decodes: smaller frames fill its stages sooner, and nobody waits for them.

Measured, 94 M parameters and two stages: prefill is as fast in frames of 64 and of 128 sent ahead, 1.4 to 1.7 times as
fast as one frame of 128 or 64 at a time.
"""
_LEAST_CHUNK = 64
"""Of a long prompt, beside a batch of short ones."""
SECOND_LANE_ROWS = 12
"""From so many requests on there are two lanes, where `lanes.crossover` did not find out better.

A step costs mostly the reading of the weights: two small ones cost more than one. Measured as above, two lanes decode
0.95 times as fast as one with 8 rows, 1.1 times with 16 and 1.3 times with 32.
"""

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
    cached: int = 0
    """Positions of the prompt that came from the prefix cache."""
    answer: list[int] = field(default_factory=list)
    done: bool = False
    remember: bool = True
    """Whether its tokens may be kept for later prompts."""

    def __post_init__(self) -> None:
        if not 0 <= self.given < self.max_tokens or self.given >= len(self.prompt):
            what = f"{self.given} tokens given, {self.max_tokens} at most, a prompt of {len(self.prompt)} with them"
            raise ValueError(f"nothing to generate for row {self.uid}: {what}")

    @property
    def rest(self) -> tuple[int, ...]:
        """Tokens of the prompt that no rank has seen, the last one included."""
        return self.prompt[self.prefilled :]


@dataclass(frozen=True, slots=True)
class Emission:
    """What one turn brought a row: a token, its end, or both."""

    uid: int
    token: int | None = None
    finish: FinishReason | None = None
    logprobs: Logprobs | None = None
    cached: int = 0
    """Tokens of the prompt that came from the prefix cache."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a frame is made of."""

    lane: int
    operations: tuple[frames.Operation, ...]


@dataclass(slots=True)
class _Lane:
    number: int
    rows: list[Row] = field(default_factory=list)
    next: list[int] = field(default_factory=list)
    step_planned: bool = False
    delayed: bool = False
    """Prompts of another lane were planned after its last step: none again before its next one."""


class Scheduler:
    """Plans frames. The caller runs every planned frame in order, and gives the tokens of its step to `take`.

    `ahead`: frames that may be under way at a time; more than one only where the ranks are stages of a pipeline.
    `max_tokens`: memory for rows, as their number times the longest of them; None: enough for any.
    `whole_prompts`: whether a prompt's last token can be computed together with the others.
    `second_lane_rows`: from so many requests on all lanes are used; it may be changed at any time.
    """

    def __init__(
        self,
        max_rows: int,
        eos: frozenset[int],
        *,
        lanes: int = 1,
        ahead: int = 1,
        max_tokens: int | None = None,
        whole_prompts: bool = False,
        second_lane_rows: int = SECOND_LANE_ROWS,
    ) -> None:
        self.prefixes = PrefixCache()
        self._max_rows = max_rows
        self._eos = eos
        self._ahead = ahead
        self._max_tokens = max_tokens
        self._whole_prompts = whole_prompts
        self.second_lane_rows = second_lane_rows
        self._waiting: deque[Row] = deque()
        self._prefilling: Row | None = None
        self._prefilling_lane = 0
        self._lanes = [_Lane(number) for number in range(lanes)]
        self._order = deque(self._lanes)
        self._held = 0

    def rows(self, lane: int) -> tuple[Row, ...]:
        """The rows of a lane's planned step, in its order."""
        return tuple(self._lanes[lane].rows)

    def submit(self, row: Row) -> None:
        """Take a row in; it waits for a place."""
        self._waiting.append(row)

    def cancel(self, uid: int) -> list[Emission]:
        """End a row wherever it is; its memory is freed by the next frame. Unknown rows are ignored."""
        for row in self._waiting:
            if row.uid == uid:
                self._waiting.remove(row)
                return [Emission(uid, finish="cancelled")]
        candidates = [row for lane in self._lanes for row in lane.rows]
        for row in [*candidates, *([self._prefilling] if self._prefilling else [])]:
            if row.uid == uid and not row.done:
                row.done, row.remember = True, False
                return [Emission(uid, finish="cancelled", cached=row.cached)]
        return []

    def take(self, lane: int, tokens: Sequence[int]) -> list[Emission]:
        """The result of the planned step of a lane: one token for each of its rows."""
        state = self._lanes[lane]
        state.step_planned = False
        emissions = []
        for row, token in zip(state.rows, tokens, strict=True):
            if row.done:
                continue
            row.generated += 1
            row.answer.append(token)
            finish = self._finish(row, token)
            row.done = finish is not None
            emissions.append(Emission(row.uid, token, finish, row.sampler.logprobs, row.cached))
        state.next = list(tokens)
        return emissions

    def _finish(self, row: Row, token: int) -> FinishReason | None:
        if (token in self._eos and not row.ignore_eos) or row.sampler.ended:
            return "stop"
        return "length" if row.given + row.generated >= row.max_tokens else None

    def plan(self) -> Turn | None:
        """The next frame: of the lane that waits for the longest time. None: nothing to do before a step's result."""
        for lane in list(self._order):
            operations = () if lane.step_planned else self._frame(lane)
            if operations:
                self._order.remove(lane)
                self._order.append(lane)
                return Turn(lane.number, operations)
        return None

    def _frame(self, lane: _Lane) -> tuple[frames.Operation, ...]:
        operations = self._release(lane)
        empty = not lane.rows
        prefill = self._prefill(lane)
        operations += prefill
        if lane.rows and not (operations and self._hold(lane)):
            first = empty and self._whole_prompts and _at_once(prefill)
            operations.append((frames.FirstStep if first else frames.Step)(tuple(lane.next)))
            lane.step_planned, lane.delayed = True, False
            self._held = 0
        return tuple(operations)

    # -- rows leave
    def _release(self, lane: _Lane) -> list[frames.Operation]:
        operations: list[frames.Operation] = []
        kept = [index for index, row in enumerate(lane.rows) if not row.done]
        if len(kept) < len(lane.rows):
            for index, row in enumerate(lane.rows):
                if row.done and row.remember:
                    operations += self._remember(index, row)
            operations.append(frames.Keep(tuple(kept)))
            lane.rows = [lane.rows[index] for index in kept]
            lane.next = [lane.next[index] for index in kept]
        if self._prefilling is not None and self._prefilling.done:
            operations.append(frames.Drop(self._prefilling.uid))
            self._prefilling = None
        return operations

    def _remember(self, index: int, row: Row) -> list[frames.Operation]:
        # The last token was given out, but never went through the model.
        change = self.prefixes.remember((*row.prompt, *row.answer[:-1]))
        if change is None:
            return []
        return [*(frames.Forget(entry) for entry in change.forget), frames.Save(index, change.entry)]

    # -- rows come
    def _prefill(self, lane: _Lane) -> list[frames.Operation]:
        others = [other for other in self._lanes if other is not lane and other.rows]
        if any(other.delayed for other in others):
            return []
        limit = FILL_TOKENS if self._filling() else CHUNK_TOKENS
        operations: list[frames.Operation] = []
        short = self._admit(lane, limit, operations)
        if short:
            operations.append(frames.PrefillBatch(tuple(row.uid for row in short), tuple(row.rest for row in short)))
            for row in short:
                self._join(lane, row)
        if self._prefilling is not None and self._prefilling_lane == lane.number:
            budget = limit - frames.area([row.rest for row in short])
            operations += self._chunk(lane, self._prefilling, max(_LEAST_CHUNK, budget))
        if operations:
            for other in others:
                other.delayed = True
        return operations

    def _admit(self, lane: _Lane, limit: int, operations: list[frames.Operation]) -> list[Row]:
        """Give free places to waiting rows, in order; a second long prompt waits for the first.

        What they take from the prefix cache goes into `operations`.
        """
        free = min(self._free(), self._share(lane))
        short: list[Row] = []
        for row in list(self._waiting):
            if free <= 0 or not self._fits([*short, row]):
                break
            hit = self.prefixes.find(row.prompt)
            rest = row.prompt[hit.positions :] if hit else row.prompt
            if len(rest) - 1 > limit:
                if self._prefilling is not None:
                    continue
                self._prefilling, self._prefilling_lane = row, lane.number
            elif frames.area([*(r.rest for r in short), rest]) <= limit:
                short.append(row)
            else:
                break
            if hit:
                operations.append(frames.Take(row.uid, hit.entry, hit.positions))
                row.cached = row.prefilled = hit.positions
            self._waiting.remove(row)
            free -= 1
        return short

    def _fits(self, joining: Sequence[Row]) -> bool:
        """Whether the memory is enough for these rows too, however long all of them get. One alone always has it."""
        rows = [row for lane in self._lanes for row in lane.rows]
        rows += [*([self._prefilling] if self._prefilling else []), *joining]
        longest = max(len(row.prompt) + row.max_tokens - row.given for row in rows)
        return len(rows) == 1 or self._max_tokens is None or len(rows) * blocks(longest) <= self._max_tokens

    def _free(self) -> int:
        return self._max_rows - sum(len(lane.rows) for lane in self._lanes) - (self._prefilling is not None)

    def _size(self, lane: _Lane) -> int:
        prefills = self._prefilling is not None and self._prefilling_lane == lane.number
        return sum(not row.done for row in lane.rows) + prefills

    def _share(self, lane: _Lane) -> int:
        """How many waiting rows may join a lane: half of all with two lanes; else only the fullest lane is filled."""
        sizes = [self._size(other) for other in self._lanes]
        active = sum(sizes) + min(len(self._waiting), self._free())
        if active >= self.second_lane_rows:
            return -(-active // len(self._lanes)) - sizes[lane.number]
        return active if sizes.index(max(sizes)) == lane.number else 0

    def _filling(self) -> bool:
        """Whether these are the stages of a pipeline in which no row decodes yet."""
        started = any(row.generated or row.done for lane in self._lanes for row in lane.rows)
        return self._ahead > 1 and not started and not any(lane.step_planned for lane in self._lanes)

    def _hold(self, lane: _Lane) -> bool:
        """Whether the step of rows that have just come waits for the next batch: the stages then prefill together."""
        alone = self._prefilling is None and not any(other.rows for other in self._lanes if other is not lane)
        more = self._waiting and self._free() > 0 and self._share(lane) > 0
        if not (self._filling() and alone and more) or self._held >= self._ahead - 1:
            return False
        self._held += 1
        return True

    def _chunk(self, lane: _Lane, row: Row, budget: int) -> list[frames.Operation]:
        end = min(row.prefilled + budget, len(row.prompt) - 1)
        operations: list[frames.Operation] = [frames.PrefillChunk(row.uid, row.prompt[row.prefilled : end])]
        row.prefilled = end
        if end == len(row.prompt) - 1:
            operations.append(frames.Join(row.uid))
            self._prefilling = None
            self._join(lane, row)
        return operations

    def _join(self, lane: _Lane, row: Row) -> None:
        lane.rows.append(row)
        lane.next.append(row.prompt[-1])


def _at_once(prefill: Sequence[frames.Operation]) -> bool:
    """Whether all rows that join do so from one and the same pass, and nothing else is computed."""
    passes = sum(isinstance(operation, frames.PrefillBatch | frames.PrefillChunk) for operation in prefill)
    return passes == 1 and any(isinstance(operation, frames.PrefillBatch | frames.Join) for operation in prefill)
