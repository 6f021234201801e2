"""Prompts that begin like earlier ones: the same tokens, with less computed, on any number of ranks."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from mlx_operator_api.tasks import Sharding
from mlx_runner import channel
from mlx_runner.engine import frames
from mlx_runner.engine.forward import Executor, WholeModel
from mlx_runner.engine.frames import Frame
from mlx_runner.engine.tail import Tail

from . import tiny_models
from .conftest import plain_mlx_lm
from .engine_ranks import Ranks, generate, running

TOKENS = 12
POSITION = tiny_models.LAYERS * 2 * 2 * 16 * 4
"""Bytes of a position in all layers: keys and values, two heads of sixteen numbers."""
GROUPS = [("single", "qwen2"), ("pipeline", "qwen2"), ("long_pipeline", "llama"), ("tensor", "qwen3")]


def text(seed: int, length: int) -> tuple[int, ...]:
    return tuple((i * i * 7 + i * 13 + seed * 101) % 370 + 10 for i in range(length))


@pytest.fixture(params=GROUPS, ids=[name for name, _ in GROUPS])
def served(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> tuple[Ranks, Path]:
    name, architecture = request.param
    ranks: Ranks = request.getfixturevalue(name)
    return ranks, tiny(architecture)


def ask(ranks: Ranks, name: str, prompt: Sequence[int], tokens: int = TOKENS) -> tuple[list[int], int]:
    """Tokens of an answer, and how many of the prompt were cached."""
    ranks[0].send(generate(name, prompt, tokens))
    return got(ranks, name)


def got(ranks: Ranks, name: str) -> tuple[list[int], int]:
    answer = ranks[0].answer(name)
    assert answer.finished is not None
    return answer.tokens, answer.finished.cached_tokens


def plain(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    answers = plain_mlx_lm(model, prompts, TOKENS)
    return [tokens[: tokens.index(2) + 1] if 2 in tokens else tokens for tokens in answers]


def test_what_was_computed_before_is_reused_and_changes_no_token(served: tuple[Ranks, Path]) -> None:
    ranks, model = served
    system, document = text(1, 100), text(2, 700)
    first = (*system, *text(3, 20))
    others = [(*system, *text(4, 9)), first, (*document, *text(5, 30)), (*document, *text(6, 300))]
    one = plain(model, [first])
    assert ask(ranks, "first", first) == (one[0], 0)
    again = (*first, *one[0], *text(7, 15))
    expected = plain(model, [*others, again])
    # By the order in which they come: the system prompt; all but the last token; nothing; the document; the dialogue.
    cached = [len(system), len(first) - 1, 0, len(document), len(first) + len(one[0]) - 1]
    for number, prompt in enumerate([*others, again]):
        assert ask(ranks, f"other-{number}", prompt) == (expected[number], cached[number]), f"prompt {number}"


def test_hits_of_different_lengths_and_misses_are_computed_in_one_batch(served: tuple[Ranks, Path]) -> None:
    ranks, model = served
    base = text(20, 90)
    prompts = [
        (*base[:30], *text(21, 12)),
        (*base[:60], *text(22, 3)),
        text(23, 25),
        (*base, 5),
        (*base[:45], *text(24, 280)),
        text(25, 1),
    ]
    expected = plain(model, prompts)
    ask(ranks, "base", base)
    for number, prompt in enumerate(prompts):
        ranks[0].send(generate(f"batch-{number}", prompt, TOKENS))
    found = [got(ranks, f"batch-{number}") for number in range(len(prompts))]
    assert [tokens for tokens, _ in found] == expected
    assert [cached for _, cached in found] == [30, 60, 0, 90, 45, 0]


@pytest.mark.parametrize(("world_size", "sharding"), [(1, Sharding.PIPELINE), (2, Sharding.PIPELINE)])
def test_the_least_recently_used_is_forgotten_for_a_new_one(
    tmp_path: Path, tiny: Callable[[str], Path], world_size: int, sharding: Sharding
) -> None:
    room = 250 * POSITION // world_size  # of two sequences of 100 tokens, on each rank
    with running(tmp_path, world_size, sharding) as ranks:
        ranks.serve(tiny("qwen2"), prompt_cache_bytes=room)
        prompts = {name: text(seed, 100) for seed, name in enumerate("abc")}
        for name in "ab":
            assert ask(ranks, f"{name}-1", prompts[name], 5)[1] == 0
        assert ask(ranks, "a-2", prompts["a"], 5)[1] == 99
        assert ask(ranks, "c-1", prompts["c"], 5)[1] == 0  # b goes
        assert [ask(ranks, f"{name}-3", prompts[name], 5)[1] for name in "ac"] == [99, 99]
        assert ask(ranks, "b-2", prompts["b"], 5)[1] == 0


def notices(ranks: Ranks) -> str:
    return "\n".join(event.text for event in ranks[0].seen if isinstance(event, channel.Notice))


def test_the_rank_with_the_most_layers_decides_how_much_is_kept(single: Ranks, long_pipeline: Ranks) -> None:
    room = 256 * 1024 * 1024  # the default where no memory limit is known
    assert f"up to {room // POSITION} tokens" in notices(single)
    # Two of the four layers are on rank 2, one on rank 0.
    assert f"up to {room // (POSITION // 2)} tokens" in notices(long_pipeline)


def test_nothing_is_kept_where_it_is_turned_off(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    with running(tmp_path, 1) as ranks:
        ranks.serve(tiny("qwen2"), prompt_cache_bytes=0)
        assert [ask(ranks, name, text(1, 100), 3)[1] for name in ("one", "two")] == [0, 0]
        assert "promptCacheBytes is 0" in notices(ranks)


def test_a_model_whose_caches_cannot_be_copied_in_part_says_so_and_works(tmp_path: Path) -> None:
    model = tiny_models.build(
        tmp_path / "model", "llama", layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16
    )
    prompt = text(1, 100)
    expected = plain(model, [prompt])[0]
    with running(tmp_path, 1) as ranks:
        ranks.serve(model)
        assert [ask(ranks, name, prompt) for name in ("one", "two")] == [(expected, 0)] * 2
        assert "prompts are not reused: layers of this model keep a window" in notices(ranks)


def test_an_entry_outlives_its_row_and_is_freed_when_it_is_forgotten(tiny: Callable[[str], Path]) -> None:
    model, _ = load_model(tiny("qwen2"))
    executor = Executor(WholeModel(model, Tail(model), leader=True))

    def run(*operations: frames.Operation) -> None:
        executor.run(Frame(1, 1, operations))

    # What earlier tests left would be given back here, and their buffers used again whatever their size.
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    run(frames.PrefillBatch((1, 2), (text(1, 200), text(2, 40))), frames.Step((5, 6)))
    assert executor.position_bytes == POSITION
    run(frames.Save(0, 7), frames.Keep(()))
    assert not executor.busy
    kept = mx.get_active_memory() - before
    assert 200 * POSITION <= kept <= 210 * POSITION
    run(frames.Take(3, 7, 150), frames.PrefillBatch((3,), ((9, 8),)), frames.Step((8,)), frames.Keep(()))
    assert mx.get_active_memory() - before <= 210 * POSITION
    run(frames.Forget(7))
    assert mx.get_active_memory() <= before + 4096
