"""Architectures that mlx-lm cannot pipeline, in real processes, token for token against plain mlx-lm in one."""

from pathlib import Path

import pytest

from mlx_runner import channel

from . import architectures
from .conftest import PROMPTS, TOKENS, plain_mlx_lm
from .engine_ranks import generate, running
from .test_engine_answers import until_eos


@pytest.mark.parametrize(("architecture", "ranks"), [("gemma3_text", 2), ("phi", 3), ("qwen3_next", 2)])
def test_a_pipeline_answers_as_one_process_does(architecture: str, ranks: int, tmp_path: Path) -> None:
    """Scaled embeddings and windows; layers in parallel; recurrent layers."""
    model = architectures.save(tmp_path / "model", architecture)
    expected = plain_mlx_lm(model, PROMPTS, TOKENS)
    with running(tmp_path, ranks) as group:
        group.serve(model)
        for number, prompt in enumerate(PROMPTS):
            group[0].send(generate(str(number), prompt, TOKENS))
        for number, wanted in enumerate(expected):
            assert group[0].answer(str(number)).tokens == until_eos(wanted), f"prompt {number}"
        group[0].send(channel.Goodbye())
        assert [rank.exit_code() for rank in group.ranks] == [0] * ranks
