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
from mlx_runner.engine.scheduler import CHUNK_TOKENS, FILL_TOKENS, SECOND_LANE_ROWS, Emission, Row, Scheduler, Turn

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


@settings(max_examples=200, deadline=None)
@given(
    steps=steps,
    places=st.sampled_from([1, 2, 4, 16]),
    shape=st.sampled_from([(1, 1), (1, 4), (2, 4), (2, 3), (3, 4)]),
    capacity=st.sampled_from([0, 100, 2000]),
    alike=st.booleans(),
    whole=st.booleans(),
)
def test_every_row_gets_what_it_would_get_alone_whatever_comes_when(
    steps: list[tuple[Any, int, int]], places: int, shape: tuple[int, int], capacity: int, alike: bool, whole: bool
) -> None:
    lanes, ahead = shape
    group = Group(Scheduler(places, frozenset({EOS}), lanes=lanes, ahead=ahead, whole_prompts=whole), ahead)
    group.scheduler.prefixes.resize(capacity)
    rows: list[Row] = []
    cancelled: set[int] = set()
    for what, first, second in steps:
        if what == "submit":
            uid = len(rows) + 1
            start = uid % 3 if alike else uid * 13
            rows.append(Row(uid, tuple((start + i) % VOCABULARY for i in range(first)), second))
            group.scheduler.submit(rows[-1])
        elif what == "turn":
            for _ in range(first):
                group.turn()
        else:
            group.note(group.scheduler.cancel(first))
            cancelled.add(first)
        assert group.ranks.rows <= places
    group.end()
    for row in rows:
        expected, got = alone(row.prompt, row.max_tokens), group.answers.get(row.uid, [])
        if group.finished[row.uid] == "cancelled":
            assert row.uid in cancelled
            assert got == expected[: len(got)]
        else:
            assert got == expected
            assert group.finished[row.uid] == ("stop" if got[-1] == EOS else "length")
    assert group.ranks.rows == 0
    assert sum(len(entry) for entry in group.ranks.entries.values()) == group.scheduler.prefixes.positions <= capacity
    assert max(group.ranks.positions, default=0) <= CHUNK_TOKENS + 64


def test_a_long_prompt_that_is_cancelled_halfway_leaves_the_ranks() -> None:
    group = Group(Scheduler(1, frozenset()), ahead=1)
    group.scheduler.submit(Row(1, tuple(range(3 * CHUNK_TOKENS)), 1))
    group.turn()
    assert list(group.ranks.prefilling) == [1]
    group.note(group.scheduler.cancel(1))
    group.end()
    assert group.ranks.prefilling == {}
    assert group.finished == {1: "cancelled"}


def test_a_row_that_ignores_the_end_token_goes_on() -> None:
    scheduler = Scheduler(1, frozenset(range(VOCABULARY)))
    scheduler.submit(Row(1, (1, 2), 3, ignore_eos=True))
    group = Group(scheduler, 1)
    group.end()
    assert len(group.answers[1]) == 3


def test_nothing_is_planned_while_a_step_is_under_way() -> None:
    scheduler = Scheduler(2, frozenset())
    scheduler.submit(Row(1, (1, 2), 3))
    assert scheduler.plan()
    scheduler.submit(Row(2, (1, 2), 3))
    assert scheduler.plan() is None
    scheduler.take(0, [9])
    turn = scheduler.plan()
    assert turn is not None
    assert any(isinstance(operation, frames.PrefillBatch) for operation in turn.operations)


def test_only_the_chunks_of_a_long_prompt_are_planned_ahead() -> None:
    scheduler = Scheduler(1, frozenset(), ahead=4)
    scheduler.submit(Row(1, tuple(range(2 * FILL_TOKENS + 11)), 1))
    planned = [scheduler.plan() for _ in range(4)]
    kinds = [[type(operation).__name__ for operation in turn.operations] if turn else [] for turn in planned]
    assert kinds == [["PrefillChunk"], ["PrefillChunk"], ["PrefillChunk", "Join", "Step"], []]


def test_the_last_token_of_prompts_that_come_to_an_empty_lane_is_computed_with_the_others() -> None:
    group = Group(Scheduler(4, frozenset(), whole_prompts=True), 1)
    for uid in (1, 2):
        group.scheduler.submit(Row(uid, tuple(range(uid, uid + 9)), 2))
    group.turn()
    group.scheduler.submit(Row(3, (4, 5, 6), 9))
    group.turn()
    group.scheduler.submit(Row(4, tuple(range(CHUNK_TOKENS + 11)), 2))
    group.end()
    assert [kinds for _, kinds in group.kinds][:2] == [["PrefillBatch", "FirstStep"], ["PrefillBatch", "Step"]]
    assert group.answers[3] == alone((4, 5, 6), 9)


def test_so_is_that_of_a_long_prompt() -> None:
    group = Group(Scheduler(1, frozenset(), ahead=4, whole_prompts=True), 4)
    group.scheduler.submit(Row(1, tuple(range(2 * FILL_TOKENS + 11)), 1))
    group.end()
    kinds = [kinds for _, kinds in group.kinds][:3]
    assert kinds == [["PrefillChunk"], ["PrefillChunk"], ["PrefillChunk", "Join", "FirstStep"]]


def test_rows_wait_until_the_memory_is_enough_for_all_of_them() -> None:
    """A batch is as long as its longest row: memory counts as their number times that, in blocks of 256."""
    scheduler = Scheduler(4, frozenset(), max_tokens=1024)
    group = Group(scheduler, 1)
    for uid, answer in ((1, 10), (2, 300), (3, 10)):
        scheduler.submit(Row(uid, (1, 2), answer))
    group.turn()
    assert len(group.ranks.lanes[0]) == 2, "two of 512; a third one would make it 1536"
    while 1 not in group.finished:
        group.turn()
    group.turn()
    assert len(group.ranks.lanes[0]) == 2
    while group.turn():
        pass
    assert set(group.finished.values()) == {"length"}


def test_one_row_alone_always_has_its_place() -> None:
    scheduler = Scheduler(4, frozenset(), max_tokens=256)
    group = Group(scheduler, 1)
    scheduler.submit(Row(1, (1, 2), 300))
    while group.turn():
        pass
    assert group.finished == {1: "length"}


def test_while_nothing_decodes_short_prompts_fill_the_stages_of_a_pipeline() -> None:
    group = Group(Scheduler(8, frozenset(), ahead=4), 4)
    for uid in range(1, 8):
        group.scheduler.submit(Row(uid, tuple(range(FILL_TOKENS // 2 + 1)), 1))
    group.end()
    # Three batches wait for no step; the fourth brings it.
    assert group.kinds[:4] == [(0, ["PrefillBatch"])] * 3 + [(0, ["PrefillBatch", "Step"])]
    assert max(group.ranks.positions) <= FILL_TOKENS


def test_short_prompts_step_at_once_where_no_other_stage_could_work() -> None:
    group = Group(Scheduler(8, frozenset()), 1)
    for uid in range(1, 4):
        group.scheduler.submit(Row(uid, tuple(range(CHUNK_TOKENS // 2 + 1)), 2))
    group.turn()
    assert group.kinds == [(0, ["PrefillBatch", "Step"])]
    assert [len(group.answers[uid]) for uid in (1, 2)] == [1, 1]


def test_a_cancelled_row_that_waits_never_reaches_the_ranks() -> None:
    scheduler = Scheduler(1, frozenset())
    for uid in (1, 2):
        scheduler.submit(Row(uid, (1, 2), 1))
    assert scheduler.cancel(2) == [Emission(2, finish="cancelled")]
    assert scheduler.cancel(2) == []
    turn = scheduler.plan()
    assert turn is not None
    first = turn.operations[0]
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
    group.end()
    assert group.answers[1] == answer[existing:]
    assert group.finished[1] == ("stop" if answer[-1] == EOS else "length")


@pytest.mark.parametrize("existing", [-1, 3, 4])
def test_a_row_with_nothing_left_to_generate_is_a_mistake_of_its_caller(existing: int) -> None:
    with pytest.raises(ValueError, match=f"{existing} tokens given, 3 at most, a prompt of 5"):
        Row(1, (1, 2, 3, 4, 5), 3, given=existing)


def two_lanes(rows: int, *, prompt: int = 5, tokens: int = 40) -> Group:
    """A pipeline that has answered a few tokens of so many requests."""
    group = Group(Scheduler(32, frozenset(), lanes=2, ahead=4), 4)
    for uid in range(1, rows + 1):
        group.scheduler.submit(Row(uid, tuple((uid + i) % VOCABULARY for i in range(prompt)), tokens))
    while len(group.answers) < rows:
        assert group.turn()
    return group


def lane_sizes(group: Group) -> list[int]:
    return [len(group.scheduler.rows(0)), len(group.scheduler.rows(1))]


def test_a_second_lane_opens_where_it_pays_and_shares_the_rows_evenly() -> None:
    assert lane_sizes(two_lanes(SECOND_LANE_ROWS - 1)) == [SECOND_LANE_ROWS - 1, 0]
    assert lane_sizes(two_lanes(SECOND_LANE_ROWS)) == [SECOND_LANE_ROWS // 2] * 2
    assert sorted(lane_sizes(two_lanes(SECOND_LANE_ROWS + 3))) == [SECOND_LANE_ROWS // 2 + 1, SECOND_LANE_ROWS // 2 + 2]


def test_rows_stay_in_their_lane_and_late_ones_join_the_emptier() -> None:
    group = two_lanes(16)
    before = [{row.uid for row in group.scheduler.rows(lane)} for lane in (0, 1)]
    for uid in list(before[0])[:3]:
        group.note(group.scheduler.cancel(uid))
    for uid in (50, 51):
        group.scheduler.submit(Row(uid, (1, 2, 3), 5))
    while {50, 51} - set(group.answers):
        assert group.turn()
    assert {50, 51} <= {row.uid for row in group.scheduler.rows(0)}
    assert {row.uid for row in group.scheduler.rows(1)} == before[1]


def test_with_few_rows_left_the_fuller_lane_takes_the_next_so_that_the_other_ends() -> None:
    group = two_lanes(12)
    for row in [*group.scheduler.rows(0)[:5], *group.scheduler.rows(1)[:2]]:
        group.note(group.scheduler.cancel(row.uid))
    group.scheduler.submit(Row(50, (1, 2, 3), 5))
    while 50 not in group.answers:
        assert group.turn()
    assert 50 in {row.uid for row in group.scheduler.rows(1)}


def test_the_next_frame_of_one_lane_is_sent_before_the_others_is_computed() -> None:
    group = two_lanes(16)
    for _ in range(10):
        group.turn()
        # Where rank 0 computes one frame, the other stage has the next one already.
        assert {turn.lane for turn in group.planned} == {1 - group.log[-1].lane}
        assert isinstance(group.planned[0].operations[-1], frames.Step)


def waits(group: Group, since: int) -> dict[int, list[int]]:
    """By lane: positions prefilled between the steps of its rows, those of its own frames included."""
    waited: dict[int, list[int]] = {0: [0], 1: [0]}
    for turn, positions in zip(group.log[since:], group.ranks.positions[since:], strict=True):
        for lane in waited:
            waited[lane][-1] += positions
        if isinstance(turn.operations[-1], frames.Step):
            waited[turn.lane].append(0)
    return waited


@pytest.mark.parametrize("rows", [4, 11, 16])
def test_a_long_prompt_delays_each_stream_by_one_chunk_at_a_time(rows: int) -> None:
    group = two_lanes(rows)
    since, streaming = len(group.log), [lane for lane in (0, 1) if group.scheduler.rows(lane)]
    group.scheduler.submit(Row(50, tuple(i % VOCABULARY for i in range(5 * CHUNK_TOKENS)), 1))
    while 50 not in group.answers:
        assert group.turn()
    waited = waits(group, since)
    assert max(max(waited[lane]) for lane in streaming) <= CHUNK_TOKENS
    chunks = [turn for turn in group.log[since:] if any(isinstance(o, frames.PrefillChunk) for o in turn.operations)]
    assert len(chunks) == 5


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_a_late_short_request_joins_at_the_next_frame_beside_a_long_prompt(rows: int) -> None:
    group = two_lanes(rows)
    group.scheduler.submit(Row(50, tuple(i % VOCABULARY for i in range(9 * CHUNK_TOKENS)), 1))
    for _ in range(3):
        group.turn()
    group.scheduler.submit(Row(51, (1, 2, 3), 3))
    planned = len(group.planned)
    frames_until = 0
    while 51 not in group.answers:
        assert group.turn()
        frames_until += 1
    assert frames_until <= planned + 1
    assert 50 not in group.answers
