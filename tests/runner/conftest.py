"""Models and groups of engines that many tests share: an engine takes seconds to start on a busy machine."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mlx_operator_api.tasks import Sharding
from mlx_runner import channel

from . import tiny_models
from .engine_ranks import ROOT, Ranks, environment, running

PROMPTS: tuple[tuple[int, ...], ...] = (
    tuple(range(5, 37)),
    tuple(range(100, 103)),
    (7,),
    tuple((i * 37) % 380 + 3 for i in range(150)),
    tuple((i * 53) % 380 + 3 for i in range(700)),
    tuple((i * 11) % 380 + 3 for i in range(20)),
)
"""Short, long, of one token; the fifth is prefilled in chunks."""
LONG = 4
TOKENS = 24
Reference = Callable[[str], list[list[int]]]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random model of an architecture, made once."""
    directory = tmp_path_factory.mktemp("tiny")

    def build(architecture: str) -> Path:
        path = directory / architecture
        if not path.exists():
            # Head and embedding apart in one of them: the first and the last stage then hold different modules.
            tiny_models.build(path, architecture, tie_word_embeddings=architecture != "llama")
        return path

    return build


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with a small random model, `tiny`."""
    directory = tmp_path_factory.mktemp("volume")
    tiny_models.build(directory / "tiny", "qwen2")
    return directory


@pytest.fixture(scope="session")
def reference(tiny: Callable[[str], Path]) -> Reference:
    """Greedy tokens of plain mlx-lm in a process of its own, for each of `PROMPTS`."""
    known: dict[str, list[list[int]]] = {}

    def ask(architecture: str) -> list[list[int]]:
        if architecture not in known:
            known[architecture] = plain_mlx_lm(tiny(architecture), PROMPTS, TOKENS)
        return known[architecture]

    return ask


def plain_mlx_lm(
    model: Path, prompts: Sequence[Sequence[int]], tokens: int, adapter: Path | None = None
) -> list[list[int]]:
    script = Path(__file__).with_name("plain_mlx_lm.py")
    done = subprocess.run(
        [sys.executable, script, model, json.dumps([list(prompt) for prompt in prompts]), str(tokens), adapter or ""],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: list[list[int]] = json.loads(done.stdout)
    return answer


def _group(directory: Path, model: Path, world_size: int, sharding: Sharding) -> Iterator[Ranks]:
    with running(directory, world_size, sharding) as ranks:
        yield ranks.serve(model)
        ranks[0].send(channel.Goodbye())
        assert [rank.exit_code() for rank in ranks.ranks] == [0] * world_size


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[Ranks]:
    yield from _group(tmp_path_factory.mktemp("single"), tiny("qwen2"), 1, Sharding.PIPELINE)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[Ranks]:
    yield from _group(tmp_path_factory.mktemp("pipeline"), tiny("qwen2"), 2, Sharding.PIPELINE)


@pytest.fixture(scope="session")
def long_pipeline(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[Ranks]:
    yield from _group(tmp_path_factory.mktemp("long-pipeline"), tiny("llama"), 3, Sharding.PIPELINE)


@pytest.fixture(scope="session")
def tensor(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Iterator[Ranks]:
    yield from _group(tmp_path_factory.mktemp("tensor"), tiny("qwen3"), 2, Sharding.TENSOR)
