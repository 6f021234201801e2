"""Every architecture of the table in docs/models.md gives the same when it is cut into stages, or split by tensors."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api.layers import split
from mlx_runner.engine import imports
from mlx_runner.engine.architectures import PIPELINE, TENSOR, TENSOR_TWO_ONLY

from . import architectures
from .engine_ranks import ROOT, environment

imports.import_all()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_runner.engine import anatomy, pipeline  # noqa: E402
from mlx_runner.engine.caches import merge  # noqa: E402
from mlx_runner.engine.tail import Tail  # noqa: E402

LONG = [(i * 37) % 380 + 3 for i in range(21)]
SHORT = [(i * 11) % 380 + 3 for i in range(9)]
"""Both longer than the windows."""
STEPS = 3
ONE_AT_A_TIME = {"gemma2", "mamba"}
"""mlx-lm's code of these computes one request at a time, or takes padding for tokens."""


@pytest.fixture(scope="module", autouse=True)
def without_a_compiler() -> Iterator[None]:
    """MLX otherwise compiles C++ for some of these models, which takes longer than all the rest."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Whole:
    """A model as mlx-lm computes it, with the face of a pipeline."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def make_cache(self) -> list[list[Any]]:
        return [list(make_prompt_cache(self._model))]

    def __call__(self, tokens: Any, caches: list[list[Any]]) -> Any:
        logits = self._model(tokens, cache=caches[0])[:, -1]
        mx.eval(logits, [cache.state for cache in caches[0]])
        return logits


class Staged:
    """The stages of a model, one after the other in this process."""

    def __init__(self, architecture: str, ranks: int) -> None:
        self.models = [architectures.build(architecture) for _ in range(ranks)]
        parts = split(len(self.models[0].layers), ranks)
        self.stages = []
        for model, part in zip(self.models, parts, strict=True):
            found = anatomy.examine(model, parts)
            pipeline.cut(model, found, part)
            self.stages.append(pipeline.Stage(model, found, part))

    def make_cache(self) -> list[list[Any]]:
        return [stage.make_cache() for stage in self.stages]

    def __call__(self, tokens: Any, caches: list[list[Any]]) -> Any:
        hidden = self.stages[-1].embed(tokens)
        for stage, kept in reversed(list(zip(self.stages, caches, strict=True))):
            hidden = stage.run(hidden, kept)
            mx.eval(hidden, [cache.state for cache in kept])
        return self.stages[0].logits(hidden)


def alone(model: Whole | Staged) -> list[Any]:
    """Logits of a prompt in chunks and of decode steps."""
    caches = model.make_cache()
    return [model(mx.array([tokens]), caches) for tokens in (LONG[:12], LONG[12:], [7], [8])]


def played(model: Whole | Staged) -> list[Any]:
    """Logits of all that serving does: a prompt in chunks, a batch of unequal prompts, decode steps of all together."""
    outputs = []
    long = model.make_cache()
    for chunk in (LONG[:12], LONG[12:]):
        outputs.append(model(mx.array([chunk]), long))
    lane = [merge([caches]) for caches in long]
    short = [SHORT, SHORT[:5]]
    batch = [merge([first, second]) for first, second in zip(model.make_cache(), model.make_cache(), strict=True)]
    padding = [len(short[0]) - len(row) for row in short]
    for cache in (cache for caches in batch for cache in caches):
        cache.prepare(lengths=[len(row) for row in short], right_padding=padding)
    model(mx.array([[*row, *[0] * pad] for row, pad in zip(short, padding, strict=True)]), batch)
    for cache in (cache for caches in batch for cache in caches):
        cache.finalize()
    for ours, theirs in zip(lane, batch, strict=True):
        for cache, other in zip(ours, theirs, strict=True):
            cache.extend(other)
    tokens = mx.array([[7], [8], [9]])
    for _ in range(STEPS):
        outputs.append(model(tokens, lane))
        tokens = outputs[-1].argmax(-1, keepdims=True)
    for caches in lane:
        for cache in caches:
            cache.filter(mx.array([2, 0]))
    outputs.append(model(tokens[mx.array([2, 0])], lane))
    return outputs


def test_the_table_is_that_of_the_tests() -> None:
    assert tuple(sorted(architectures.ARCHITECTURES)) == PIPELINE
    assert set(TENSOR) <= set(PIPELINE)


@pytest.mark.parametrize("architecture", PIPELINE)
def test_stages_compute_what_the_whole_does(architecture: str) -> None:
    model = architectures.build(architecture)
    assert hasattr(model, "shard") == (architecture in TENSOR)
    together = architecture not in ONE_AT_A_TIME
    assert anatomy.measure(model)[1] == together
    play = played if together else alone
    expected = play(Whole(model))
    assert min(output.std().item() for output in expected) > 0
    for ranks in (2, 3):
        for got, wanted in zip(play(Staged(architecture, ranks)), expected, strict=True):
            assert mx.array_equal(got, wanted), f"{ranks} ranks"


@pytest.mark.parametrize("architecture", PIPELINE)
def test_the_last_token_of_a_prompt_computed_with_the_others_gives_what_a_step_gives(architecture: str) -> None:
    model = architectures.build(architecture)
    assert anatomy.ends_suffice(model)
    prompts = [SHORT, SHORT[:5]] if architecture not in ONE_AT_A_TIME else [SHORT]

    def prefilled(lengths: Sequence[int]) -> tuple[list[Any], Any]:
        caches, longest = merge([make_prompt_cache(model) for _ in lengths]), max(lengths)
        for cache in caches:
            cache.prepare(lengths=list(lengths), right_padding=[longest - length for length in lengths])
        rows = [[*prompt[:n], *[0] * (longest - n)] for prompt, n in zip(prompts, lengths, strict=True)]
        logits = model(mx.array(rows), cache=caches)
        mx.eval(logits, [cache.state for cache in caches])
        for cache in caches:
            cache.finalize()
        return caches, logits

    caches, _ = prefilled([len(prompt) - 1 for prompt in prompts])
    expected = [model(mx.array([[prompt[-1]] for prompt in prompts]), cache=caches)]
    expected.append(model(mx.array([[7]] * len(prompts)), cache=caches))
    alone = [_after(model, prompt) for prompt in prompts]
    for got, wanted in zip(expected, zip(*alone, strict=True), strict=True):
        assert mx.allclose(got, mx.concatenate(list(wanted)), rtol=1e-3, atol=1e-4), "in company as alone"
    tail, lengths = Tail(model), [len(prompt) for prompt in prompts]
    with tail.only(lengths):
        caches, first = prefilled(lengths)
    for got, wanted in zip([first, model(mx.array([[7]] * len(prompts)), cache=caches)], expected, strict=True):
        assert got.shape == wanted.shape
        assert mx.allclose(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "qwen3_next"])
def test_the_stages_together_hold_every_tensor_and_few_of_them_twice(architecture: str) -> None:
    whole = {name: array.nbytes for name, array in tree_flatten(architectures.build(architecture).parameters())}
    stages = [dict(tree_flatten(model.parameters())) for model in Staged(architecture, 3).models]
    assert set.union(*(set(stage) for stage in stages)) == set(whole)
    twice = sum(stage[name].nbytes for stage in stages for name in stage) - sum(whole.values())
    tied = architecture == "gpt2"
    assert twice <= (384 * 64 * 4 if tied else 0)


class Sharing(nn.Module):  # type: ignore[misc]
    """Layers that pass something beside hidden states to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 8)
        self.layers = [Layer() for _ in range(4)]

    def __call__(self, tokens: Any, cache: Any = None) -> Any:
        first = hidden = self.embed_tokens(tokens)
        for layer, own in zip(self.layers, cache, strict=True):
            hidden = layer(hidden + first, own)
            first = hidden
        return hidden


class Layer(nn.Module):  # type: ignore[misc]
    """Keys and values, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def __call__(self, hidden: Any, cache: Any) -> Any:
        cache.update_and_fetch(hidden[:, None], hidden[:, None])
        return self.projection(hidden)


def _after(model: Any, prompt: Sequence[int]) -> list[Any]:
    """Logits after a prompt, and after one more token."""
    cache = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=cache)
    return [model(mx.array([[token]]), cache=cache) for token in (prompt[-1], 7)]


class Blurring(Sharing):
    """What follows its layers looks at several positions."""

    def __call__(self, tokens: Any, cache: Any = None) -> Any:
        hidden = self.embed_tokens(tokens)
        for layer, own in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, own)
        return hidden + hidden.mean(axis=1, keepdims=True)


class Late(Sharing):
    """What follows its layers needs what stood before them."""

    def __call__(self, tokens: Any, cache: Any = None) -> Any:
        first = hidden = self.embed_tokens(tokens)
        for layer, own in zip(self.layers, cache, strict=True):
            hidden = layer(hidden, own)
        return hidden + first


@pytest.mark.parametrize("kind", [Blurring, Late])
def test_where_more_than_the_ends_of_rows_is_needed_prompts_are_not_cut(kind: type[Sharing]) -> None:
    model = kind()
    kinds = [type(module) for module in model.modules()]
    assert not anatomy.ends_suffice(model)
    assert [type(module) for module in model.modules()] == kinds, "the model is as before"


def test_a_model_whose_layers_share_more_than_hidden_states_is_found_out() -> None:
    model = Sharing()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(anatomy.UnsuitableError, match="more than hidden states passes between its layers"):
        anatomy.examine(model, split(4, 2))
    assert [type(module) for module in model.modules()] == kinds, "the model is as before"


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_tensor_group_computes_what_the_whole_does(ranks: int, tmp_path: Path, unused_tcp_ports: list[int]) -> None:
    names = [name for name in TENSOR if ranks == 2 or name not in TENSOR_TWO_ONLY]
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in unused_tcp_ports[:ranks]]))
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runner.tensor_table", *names],
            env={**environment(), "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=150) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * ranks, said
    found = json.loads(said[0][0])
    assert set(found) == set(names)
    assert {name: worst for name, (worst, equal) in found.items() if worst > 1e-5 or not equal} == {}


@pytest.fixture
def unused_tcp_ports() -> list[int]:
    """Ports that nobody listens on."""
    import socket

    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
