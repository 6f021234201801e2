"""The scheduler, against a model of what the ranks do with its frames.

Whatever comes when, every row gets the tokens that it would get alone.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_runner.engine import frames
from mlx_runner.engine.scheduler import CHUNK_TOKENS, FILL_TOKENS, Emission, Row, Scheduler
from tests.unit.scheduled import EOS, VOCABULARY, Group, alone, steps


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
