"""Ranks that obey the frames of a scheduler, with a model that is a hash."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st

from mlx_runner.engine import frames
from mlx_runner.engine.scheduler import CHUNK_TOKENS, Emission, Scheduler, Turn

VOCABULARY = 50
EOS = 0


def next_token(sequence: Sequence[int]) -> int:
    """A deterministic "model": the next token depends on the whole sequence."""
    value = 7
    for token in sequence:
        value = (value * 31 + token) % 1_000_003
    return value % VOCABULARY


def alone(prompt: Sequence[int], max_tokens: int) -> list[int]:
    sequence = list(prompt)
    answer: list[int] = []
    while len(answer) < max_tokens and (not answer or answer[-1] != EOS):
        answer.append(next_token(sequence))
        sequence.append(answer[-1])
    return answer


@dataclass
class Ranks:
    """What every rank keeps: the lanes' caches in order, those of prompts that are being prefilled, and entries."""

    lanes: dict[int, list[list[int]]] = field(default_factory=dict)
    prefilling: dict[int, list[int]] = field(default_factory=dict)
    entries: dict[int, list[int]] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    """Prefilled positions by frame."""

    def run(self, turn: Turn) -> list[int] | None:
        tokens: list[int] | None = None
        lane = self.lanes.setdefault(turn.lane, [])
        prefilled, passes, before = 0, 0, len(lane)
        for operation in turn.operations:
            assert tokens is None, "a step is the last operation of its frame"
            match operation:
                case frames.PrefillBatch(uids, prompts):
                    prefilled, passes = prefilled + frames.area(prompts), passes + 1
                    for uid, prompt in zip(uids, prompts, strict=True):
                        lane.append([*self.prefilling.pop(uid, []), *prompt[:-1]])
                case frames.PrefillChunk(uid, chunk):
                    assert chunk
                    prefilled, passes = prefilled + len(chunk), passes + 1
                    self.prefilling.setdefault(uid, []).extend(chunk)
                case frames.Join(uid):
                    lane.append(self.prefilling.pop(uid))
                case frames.Keep(rows):
                    lane[:] = [lane[row] for row in rows]
                    before = len(lane)
                case frames.Drop(uid):
                    del self.prefilling[uid]
                case frames.Take(uid, entry, positions):
                    assert uid not in self.prefilling
                    assert len(self.entries[entry]) >= positions
                    self.prefilling[uid] = self.entries[entry][:positions]
                case frames.Save(row, entry):
                    assert entry not in self.entries
                    self.entries[entry] = list(lane[row])
                case frames.Forget(entry):
                    del self.entries[entry]
                case frames.Step(given_tokens) | frames.FirstStep(given_tokens):
                    assert len(given_tokens) == len(lane)
                    if isinstance(operation, frames.FirstStep):
                        assert (before, passes) == (0, 1), "all its rows come from one pass of this frame"
                    for cache, token in zip(lane, given_tokens, strict=True):
                        cache.append(token)
                    tokens = [next_token(cache) for cache in lane]
                case _:
                    pytest.fail(f"{operation} is not the scheduler's")
        self.positions.append(prefilled)
        return tokens

    @property
    def rows(self) -> int:
        return sum(len(lane) for lane in self.lanes.values()) + len(self.prefilling)


@dataclass
class Group:
    """Scheduler and ranks, with frames planned ahead as rank 0 does it."""

    scheduler: Scheduler
    ahead: int
    ranks: Ranks = field(default_factory=Ranks)
    planned: list[Turn] = field(default_factory=list)
    log: list[Turn] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)

    def note(self, emissions: Sequence[Emission]) -> None:
        for emission in emissions:
            assert emission.uid not in self.finished
            if emission.token is not None:
                self.answers.setdefault(emission.uid, []).append(emission.token)
            if emission.finish is not None:
                self.finished[emission.uid] = emission.finish
                self.cached[emission.uid] = emission.cached

    def turn(self) -> bool:
        """One frame; whether there was one."""
        while len(self.planned) < self.ahead and (turn := self.scheduler.plan()):
            self.planned.append(turn)
        if not self.planned:
            return False
        turn = self.planned.pop(0)
        self.log.append(turn)
        tokens = self.ranks.run(turn)
        if tokens is not None:
            self.note(self.scheduler.take(turn.lane, tokens))
        return True

    def end(self) -> None:
        """Until nothing is left to do."""
        turns = 0
        while self.turn():
            turns += 1
            assert turns < 5000

    @property
    def kinds(self) -> list[tuple[int, list[str]]]:
        """The frames so far: their lane and what they do."""
        return [(turn.lane, [type(operation).__name__ for operation in turn.operations]) for turn in self.log]


lengths = st.one_of(st.integers(1, 40), st.sampled_from([CHUNK_TOKENS, CHUNK_TOKENS + 1, CHUNK_TOKENS + 2, 700]))

steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), lengths, st.integers(1, 12)),
        st.tuples(st.just("submit"), st.integers(1, 60), st.integers(1, 12)),
        st.tuples(st.just("turn"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
    ),
    max_size=50,
)
