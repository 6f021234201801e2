"""Two lanes, and what a long prompt costs the others. No MLX."""

import pytest

from mlx_runner.engine import frames
from mlx_runner.engine.scheduler import CHUNK_TOKENS, SECOND_LANE_ROWS, Row, Scheduler
from tests.unit.scheduled import VOCABULARY, Group


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
