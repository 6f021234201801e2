"""A group of engines gives, token for token, what one process of plain mlx-lm gives."""

import time
from pathlib import Path
from typing import Any

import pytest

from mlx_runner import channel
from mlx_runner.progress import Phase

from . import tiny_models
from .conftest import LONG, PROMPTS, TOKENS, Reference, plain_mlx_lm
from .engine_ranks import OPENBLAS, Ranks, generate, running, wait_until

GROUPS = [("single", "qwen2"), ("pipeline", "qwen2"), ("long_pipeline", "llama"), ("tensor", "qwen3")]


@pytest.fixture(params=GROUPS, ids=[name for name, _ in GROUPS])
def served(request: pytest.FixtureRequest) -> tuple[Ranks, str]:
    name, architecture = request.param
    ranks: Ranks = request.getfixturevalue(name)
    return ranks, architecture


def until_eos(tokens: list[int], eos: int = 2) -> list[int]:
    """An answer ends with the end-of-answer token; the oracle goes on."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def test_one_request_at_a_time_gets_the_tokens_of_one_process(served: tuple[Ranks, str], reference: Reference) -> None:
    ranks, architecture = served
    expected = reference(architecture)
    for number in (0, 2, LONG):
        ranks[0].send(generate(f"alone-{number}", PROMPTS[number], TOKENS))
        answer = ranks[0].answer(f"alone-{number}")
        assert answer.tokens == until_eos(expected[number]), f"prompt {number}"
        assert answer.finished is not None
        assert answer.finished.prompt_tokens == len(PROMPTS[number])
        assert answer.finished.completion_tokens == len(answer.tokens)


def test_requests_that_join_at_different_times_do_not_change_each_other(
    served: tuple[Ranks, str], reference: Reference
) -> None:
    ranks, architecture = served
    leader, expected = ranks[0], reference(architecture)
    leader.send(generate("joining-0", PROMPTS[0], TOKENS))
    leader.expect(channel.Delta)
    for number in (LONG, 1, 2):
        leader.send(generate(f"joining-{number}", PROMPTS[number], TOKENS))
    leader.expect(channel.Delta, where=lambda event: event.id == "joining-1")
    for number in (3, 5):
        leader.send(generate(f"joining-{number}", PROMPTS[number], TOKENS))
    for number in range(len(PROMPTS)):
        assert leader.answer(f"joining-{number}").tokens == until_eos(expected[number]), f"prompt {number}"


def test_layers_with_a_sliding_window_answer_as_in_one_process(tmp_path: Path) -> None:
    model = tiny_models.build(
        tmp_path / "model", "llama", layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16
    )
    expected = plain_mlx_lm(model, PROMPTS, TOKENS)
    with running(tmp_path, 1) as ranks:
        ranks.serve(model)
        for number, prompt in enumerate(PROMPTS):
            ranks[0].send(generate(f"sliding-{number}", prompt, TOKENS))
        for number in range(len(PROMPTS)):
            assert ranks[0].answer(f"sliding-{number}").tokens == until_eos(expected[number]), f"prompt {number}"


def test_a_long_prompt_does_not_stop_the_answers_that_are_under_way(pipeline: Ranks) -> None:
    leader = pipeline[0]
    long = PROMPTS[LONG][::-1] * 2  # six chunks, none of them known from another test
    leader.send(generate("running", PROMPTS[0], 200))
    leader.expect(channel.Delta, where=lambda event: event.id == "running")
    seen = len(leader.answers["running"].tokens)
    leader.send(generate("long", long, 2))
    leader.expect(channel.Delta, where=lambda event: event.id == "long")
    assert len(leader.answers["running"].tokens) >= seen + 5
    leader.send(channel.Cancel(id="running"))
    leader.answer("running")
    leader.answer("long")


def test_a_seeded_request_is_sampled_alike_alone_and_in_company(pipeline: Ranks) -> None:
    leader = pipeline[0]

    def ask(name: str, seed: int, **options: Any) -> None:
        leader.send(generate(name, PROMPTS[0], TOKENS, temperature=0.9, seed=seed, **options))

    ask("alone", 7, top_p=0.8)
    alone = leader.answer("alone").tokens
    for seed in range(20, 24):
        ask(f"other-{seed}", seed)
    ask("in-company", 7, top_p=0.8)
    ask("another-seed", 8, top_p=0.8)
    assert leader.answer("in-company").tokens == alone
    assert leader.answer("another-seed").tokens != alone
    others = {tuple(leader.answer(f"other-{seed}").tokens) for seed in range(20, 24)}
    assert len(others) == 4


def test_the_loaded_shards_share_the_layers_with_fewer_on_rank_0(long_pipeline: Ranks, pipeline: Ranks) -> None:
    layers = [
        [event.layers for event in rank.seen if isinstance(event, channel.Loaded)] for rank in long_pipeline.ranks
    ]
    assert layers == [["3-3"], ["2-2"], ["0-1"]]
    progress = [event for event in pipeline[0].seen if isinstance(event, channel.LayerLoaded)]
    assert [(event.loaded, event.total) for event in progress] == [(1, 2), (2, 2)]


def test_an_engine_says_what_it_computes_with(single: Ranks) -> None:
    started = single[0].started
    assert started.device in ("cpu", "gpu")
    assert started.blas == ("openblas" if OPENBLAS.exists() else "bundled")
    assert started.pid == single[0].process.pid


def test_steps_and_phases_are_in_shared_memory(served: tuple[Ranks, str]) -> None:
    ranks, _ = served
    before = [rank.progress.read().steps for rank in ranks.ranks]
    ranks[0].send(generate("steps", PROMPTS[1], 5))
    ranks[0].answer("steps")
    for rank, steps in zip(ranks.ranks, before, strict=True):

        def resting(rank: Any = rank, steps: int = steps) -> bool:
            snapshot = rank.progress.read()
            return bool(snapshot.steps >= steps + 5 and snapshot.phase is Phase.IDLE)

        wait_until(resting, 20, f"rank {rank.rank} is idle after 5 steps: {rank.progress.read()}")


def test_idle_ranks_use_no_cpu(single: Ranks, pipeline: Ranks, long_pipeline: Ranks, tensor: Ranks) -> None:
    groups = (single, pipeline, long_pipeline, tensor)
    for ranks in groups:
        ranks[0].send(generate("before-idle", PROMPTS[1], 2))
        ranks[0].answer("before-idle")
    # Not to wait for something: to measure over a time, after freed memory was given back (a second later).
    time.sleep(1.5)
    everyone = [rank for ranks in groups for rank in ranks.ranks]
    before = [rank.cpu_seconds() for rank in everyone]
    time.sleep(3)
    used = [rank.cpu_seconds() - cpu for rank, cpu in zip(everyone, before, strict=True)]
    assert max(used) < 0.15, used
