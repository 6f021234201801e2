"""The scheduler, against a model of what the ranks do with its frames.

Whatever comes when, every row gets the tokens that it would get alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_runner.engine import frames
from mlx_runner.engine.scheduler import CHUNK_TOKENS, Emission, Row, Scheduler

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
    """What every rank keeps: the lane's caches in order, and those of prompts that are being prefilled."""

    lane: list[list[int]] = field(default_factory=list)
    prefilling: dict[int, list[int]] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    """Prefilled positions by frame."""

    def run(self, operations: Sequence[frames.Operation]) -> list[int] | None:
        tokens: list[int] | None = None
        prefilled = 0
        for operation in operations:
            assert tokens is None, "a step is the last operation of its frame"
            match operation:
                case frames.PrefillBatch(_, prompts):
                    prefilled += frames.area(prompts)
                    self.lane += [list(prompt[:-1]) for prompt in prompts]
                case frames.PrefillChunk(uid, chunk):
                    assert chunk
                    prefilled += len(chunk)
                    self.prefilling.setdefault(uid, []).extend(chunk)
                case frames.Join(uid):
                    self.lane.append(self.prefilling.pop(uid))
                case frames.Keep(rows):
                    self.lane = [self.lane[row] for row in rows]
                case frames.Drop(uid):
                    del self.prefilling[uid]
                case frames.Step(given_tokens):
                    assert len(given_tokens) == len(self.lane)
                    for cache, token in zip(self.lane, given_tokens, strict=True):
                        cache.append(token)
                    tokens = [next_token(cache) for cache in self.lane]
                case _:
                    pytest.fail(f"{operation} is not the scheduler's")
        self.positions.append(prefilled)
        return tokens


@dataclass
class Group:
    """Scheduler and ranks, with frames planned ahead as rank 0 does it."""

    scheduler: Scheduler
    ahead: int
    ranks: Ranks = field(default_factory=Ranks)
    planned: list[tuple[frames.Operation, ...]] = field(default_factory=list)
    answers: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, str] = field(default_factory=dict)

    def note(self, emissions: Sequence[Emission]) -> None:
        for emission in emissions:
            assert emission.uid not in self.finished
            if emission.token is not None:
                self.answers.setdefault(emission.uid, []).append(emission.token)
            if emission.finish is not None:
                self.finished[emission.uid] = emission.finish

    def turn(self) -> bool:
        """One frame; whether there was one."""
        while len(self.planned) < self.ahead and (operations := self.scheduler.plan()):
            self.planned.append(operations)
        if not self.planned:
            return False
        tokens = self.ranks.run(self.planned.pop(0))
        if tokens is not None:
            self.note(self.scheduler.take(tokens))
        return True


lengths = st.one_of(st.integers(1, 40), st.sampled_from([CHUNK_TOKENS, CHUNK_TOKENS + 1, CHUNK_TOKENS + 2, 700]))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), lengths, st.integers(1, 12)),
        st.tuples(st.just("turn"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 12), st.just(0)),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(steps=steps, places=st.integers(1, 4), ahead=st.integers(1, 3))
def test_every_row_gets_what_it_would_get_alone_whatever_comes_when(
    steps: list[tuple[Any, int, int]], places: int, ahead: int
) -> None:
    group = Group(Scheduler(places, frozenset({EOS})), ahead)
    rows: list[Row] = []
    cancelled: set[int] = set()
    for what, first, second in steps:
        if what == "submit":
            uid = len(rows) + 1
            rows.append(Row(uid, tuple((uid * 13 + i) % VOCABULARY for i in range(first)), second))
            group.scheduler.submit(rows[-1])
        elif what == "turn":
            for _ in range(first):
                group.turn()
        else:
            group.note(group.scheduler.cancel(first))
            cancelled.add(first)
        assert len(group.ranks.lane) + len(group.ranks.prefilling) <= places
    turns = 0
    while group.turn():
        turns += 1
        assert turns < 2000
        assert len(group.ranks.lane) + len(group.ranks.prefilling) <= places
    for row in rows:
        expected, got = alone(row.prompt, row.max_tokens), group.answers.get(row.uid, [])
        if group.finished[row.uid] == "cancelled":
            assert row.uid in cancelled
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert group.finished[row.uid] == ("stop" if got[-1] == EOS else "length")
    assert not group.ranks.lane
    assert not group.ranks.prefilling
    assert max(group.ranks.positions, default=0) <= CHUNK_TOKENS + 64


def test_a_long_prompt_that_is_cancelled_halfway_leaves_the_ranks() -> None:
    group = Group(Scheduler(1, frozenset()), ahead=1)
    group.scheduler.submit(Row(1, tuple(range(3 * CHUNK_TOKENS)), 1))
    group.turn()
    assert list(group.ranks.prefilling) == [1]
    group.note(group.scheduler.cancel(1))
    while group.turn():
        pass
    assert group.ranks.prefilling == {}
    assert group.finished == {1: "cancelled"}


def test_a_row_that_ignores_the_end_token_goes_on() -> None:
    scheduler = Scheduler(1, frozenset(range(VOCABULARY)))
    scheduler.submit(Row(1, (1, 2), 3, ignore_eos=True))
    group = Group(scheduler, 1)
    while group.turn():
        pass
    assert len(group.answers[1]) == 3


def test_nothing_is_planned_while_a_step_is_under_way() -> None:
    scheduler = Scheduler(2, frozenset())
    scheduler.submit(Row(1, (1, 2), 3))
    assert scheduler.plan()
    scheduler.submit(Row(2, (1, 2), 3))
    assert scheduler.plan() == ()
    scheduler.take([9])
    assert any(isinstance(operation, frames.PrefillBatch) for operation in scheduler.plan())


def test_only_the_chunks_of_a_long_prompt_are_planned_ahead() -> None:
    scheduler = Scheduler(1, frozenset())
    scheduler.submit(Row(1, tuple(range(2 * CHUNK_TOKENS + 11)), 1))
    planned = [scheduler.plan() for _ in range(4)]
    kinds = [[type(operation).__name__ for operation in operations] for operations in planned]
    assert kinds == [["PrefillChunk"], ["PrefillChunk"], ["PrefillChunk", "Join", "Step"], []]


def test_a_cancelled_row_that_waits_never_reaches_the_ranks() -> None:
    scheduler = Scheduler(1, frozenset())
    for uid in (1, 2):
        scheduler.submit(Row(uid, (1, 2), 1))
    assert scheduler.cancel(2) == [Emission(2, finish="cancelled")]
    assert scheduler.cancel(2) == []
    first = scheduler.plan()[0]
    assert isinstance(first, frames.PrefillBatch)
    assert first.uids == (1,)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 300), cut=st.integers(1, 11), seed=st.integers(0, 99))
def test_a_row_that_begins_in_the_middle_of_its_answer_goes_on_as_if_it_had_not_been_interrupted(
    length: int, cut: int, seed: int
) -> None:
    prompt = tuple((seed * 13 + i) % VOCABULARY for i in range(length))
    answer = alone(prompt, 12)
    existing = min(cut, len(answer) - 1)
    group = Group(Scheduler(2, frozenset({EOS})), 1)
    group.scheduler.submit(Row(1, (*prompt, *answer[:existing]), 12, given=existing))
    while group.turn():
        pass
    assert group.answers[1] == answer[existing:]
    assert group.finished[1] == ("stop" if answer[-1] == EOS else "length")


@pytest.mark.parametrize("existing", [-1, 3, 4])
def test_a_row_with_nothing_left_to_generate_is_a_mistake_of_its_caller(existing: int) -> None:
    with pytest.raises(ValueError, match=f"{existing} tokens given, 3 at most, a prompt of 5"):
        Row(1, (1, 2, 3, 4, 5), 3, given=existing)
