"""Two lanes of a pipeline: the same tokens as in one process, whoever comes and goes when."""

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_operator_api.tasks import Sharding
from mlx_runner import channel
from mlx_runner.engine import frames
from mlx_runner.engine.forward import Executor, WholeModel
from mlx_runner.engine.frames import Frame
from mlx_runner.engine.lanes import SIZES
from mlx_runner.engine.scheduler import SECOND_LANE_ROWS
from mlx_runner.engine.tail import Tail

from .conftest import plain_mlx_lm
from .engine_ranks import Ranks, generate, running, wait_until

TOKENS = 16
PLACES = 24
PROMPTS = [tuple((i * 37 + number * 13) % 380 + 3 for i in range(5 + number * 7 % 60)) for number in range(PLACES)]
LONG = tuple((i * 53) % 380 + 3 for i in range(1800))


@pytest.fixture(scope="module")
def expected(tiny: Callable[[str], Path]) -> list[list[int]]:
    answers = plain_mlx_lm(tiny("qwen2"), PROMPTS, TOKENS)
    return [tokens[: tokens.index(2) + 1] if 2 in tokens else tokens for tokens in answers]


@pytest.fixture(scope="module", params=[2, 3])
def wide(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]
) -> Iterator[Ranks]:
    """A pipeline with places for two lanes."""
    with running(tmp_path_factory.mktemp("wide"), request.param, Sharding.PIPELINE) as ranks:
        ranks.connect()
        ranks.load(tiny("qwen2"), max_concurrent_requests=PLACES)
        ranks.warm_up(second_lane_rows=SECOND_LANE_ROWS)
        yield ranks


def all_rest(ranks: Ranks) -> None:
    """No rank has a sequence left."""
    for rank in ranks.ranks:
        wait_until(lambda rank=rank: rank.progress.read().phase == 0, 20, f"rank {rank.rank} rests")  # type: ignore[misc]


@pytest.mark.parametrize("concurrency", [1, 4, 8, SECOND_LANE_ROWS, 16, PLACES])
def test_any_number_of_requests_gets_the_tokens_of_one_process(
    wide: Ranks, expected: list[list[int]], concurrency: int
) -> None:
    for number in range(concurrency):
        wide[0].send(generate(f"{concurrency}-{number}", PROMPTS[number], TOKENS))
    for number in range(concurrency):
        assert wide[0].answer(f"{concurrency}-{number}").tokens == expected[number], f"prompt {number}"


def test_rows_that_come_and_leave_one_by_one_change_no_other(wide: Ranks, expected: list[list[int]]) -> None:
    leader = wide[0]
    leaving = list(range(0, 14, 2))
    names = [f"first-{number}" for number in range(PLACES)]
    for number in range(14):
        leader.send(generate(names[number], PROMPTS[number], 900 if number in leaving else TOKENS))
    leader.expect(channel.Delta, where=lambda event: event.id == names[13])
    for number in range(14, PLACES):
        leader.send(generate(names[number], PROMPTS[number], TOKENS))
        if number - 14 < len(leaving):
            leader.send(channel.Cancel(id=names[leaving[number - 14]]))
        leader.expect(channel.Delta, where=lambda event, name=names[number]: event.id == name)  # type: ignore[misc]
    for number, name in enumerate(names):
        tokens = leader.answer(name).tokens[:TOKENS]
        assert tokens == expected[number][: len(tokens) if number in leaving else TOKENS], f"prompt {number}"
    all_rest(wide)


@pytest.mark.parametrize("after", ["at once", "accepted", "first token", "some tokens"])
def test_a_cancel_at_any_point_frees_every_rank(wide: Ranks, after: str) -> None:
    leader = wide[0]
    names = [f"{after}-{number}" for number in range(PLACES + 4)]  # the last four wait for a place
    for number, name in enumerate(names):
        leader.send(generate(name, LONG if number in (3, 7) else PROMPTS[number % PLACES], 200))
    if after == "accepted":
        leader.expect(channel.Accepted, where=lambda event: event.id == names[-1])
    elif after == "first token":
        leader.expect(channel.Delta)
    elif after == "some tokens":
        leader.expect(channel.Delta, where=lambda event: len(leader.answers[event.id].tokens) > 5)
    for name in names:
        leader.send(channel.Cancel(id=name))
    for name in names:
        finished = leader.answer(name).finished
        assert finished is not None and finished.finish_reason in ("cancelled", "stop")
    all_rest(wide)


def test_a_late_short_request_is_answered_before_a_long_prompt_is_read(wide: Ranks) -> None:
    leader = wide[0]
    for number in range(4):
        leader.send(generate(f"running-{number}", PROMPTS[number], 300))
    leader.expect(channel.Delta, where=lambda event: event.id == "running-3")
    leader.send(generate("long", LONG, 2), generate("late", PROMPTS[5][:6], 2))
    for name in ["late", "long"]:
        leader.answer(name)
    order = [event.id for event in leader.seen if isinstance(event, channel.Delta)]
    assert order.index("late") < order.index("long")
    for number in range(4):
        leader.send(channel.Cancel(id=f"running-{number}"))
    all_rest(wide)


def test_the_warm_up_finds_out_from_how_many_requests_on_a_second_lane_pays(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    with running(tmp_path, 2, Sharding.PIPELINE) as ranks:
        ranks.serve(tiny("qwen2"), max_concurrent_requests=PLACES)
        said = [event.text for event in ranks[0].seen if isinstance(event, channel.Notice)]
        found = next(re.match("two lanes from ([0-9]+) requests on", text) for text in said if "two lanes" in text)
        assert found is not None
        assert 2 <= int(found[1]) <= PLACES + SECOND_LANE_ROWS
        (told,) = (event for event in ranks[0].seen if isinstance(event, channel.WarmedUp))
        assert told.second_lane_rows == int(found[1]), "the supervisor keeps it for the next engine"
        assert ranks[0].progress.read().steps > 2 * SIZES[0]
        all_rest(ranks)


def test_a_warm_up_that_is_told_what_an_earlier_one_found_does_not_measure_again(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    with running(tmp_path, 2, Sharding.PIPELINE) as ranks:
        ranks.connect()
        ranks.load(tiny("qwen2"), max_concurrent_requests=PLACES)
        ranks.warm_up(second_lane_rows=7)
        said = [event.second_lane_rows for event in ranks[0].seen if isinstance(event, channel.WarmedUp)]
        assert said == [7]
        assert ranks[0].progress.read().steps < 2 * SIZES[0], "it measured"


def test_rows_that_leave_take_their_memory_with_them(tiny: Callable[[str], Path]) -> None:
    model, _ = load_model(tiny("qwen2"))
    executor = Executor(WholeModel(model, Tail(model), leader=True))

    def run(lane: int, *operations: frames.Operation) -> None:
        executor.run(Frame(1, 1, operations, lane))

    def batch(uids: Sequence[int], length: int) -> frames.PrefillBatch:
        return frames.PrefillBatch(tuple(uids), tuple(tuple(range(uid, uid + length)) for uid in uids))

    # What earlier tests left would be given back here, and their buffers used again whatever their size.
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    run(0, batch((1, 2), 200), frames.Step((5, 6)))
    run(1, batch((3, 4), 100), frames.PrefillChunk(5, tuple(range(200))), frames.Step((7, 8)))
    full = mx.get_active_memory()
    assert executor.busy
    run(1, frames.Drop(5), frames.Keep(()))
    half = mx.get_active_memory()
    run(0, frames.Keep(()))
    assert not executor.busy
    assert full > half > before
    assert mx.get_active_memory() <= before + 4096
