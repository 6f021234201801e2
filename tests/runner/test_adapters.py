"""Adapters: what mlx-lm computes with one in a single process, on one rank and on several; or what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Sharding
from mlx_runner import channel
from mlx_runner.engine import imports

from . import architectures
from .conftest import PROMPTS, plain_mlx_lm
from .engine_ranks import generate, running
from .test_engine_answers import until_eos
from .test_engine_load import load, refused

imports.import_all()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402
from mlx_lm.utils import load_model  # noqa: E402

TOKENS = 16
KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


def make(path: Path, model: Path, *, kind: str = "lora", layers: int = 3, keys: list[str] | None = None) -> Path:
    """A random adapter, as mlx-lm's training writes one."""
    path.mkdir()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": KEYS if keys is None else keys}
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(config))
    base, _ = load_model(model)
    linear_to_lora_layers(base, layers, parameters, use_dora=kind == "dora")
    mx.random.seed(3)
    leaves = ("lora_a", "lora_b", "m")
    found = {name: array for name, array in tree_flatten(base.parameters()) if name.rpartition(".")[2] in leaves}
    arrays = {name: a if name.endswith(".m") else mx.random.normal(a.shape) * 0.2 for name, a in found.items()}
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return architectures.save(tmp_path_factory.mktemp("adapted") / "model", "llama", layer_types=None)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fused_adapter_computes_what_mlx_lm_computes_with_it(
    kind: str, ranks: int, model: Path, tmp_path: Path
) -> None:
    adapter = make(tmp_path / "adapter", model, kind=kind)
    whole, _ = load_model(model)
    tokens = mx.array([list(PROMPTS[0])])
    without = whole(tokens)[:, -1]
    wanted = load_adapters(whole, str(adapter))(tokens)[:, -1]
    shards = [load(model, rank, ranks, adapter=str(adapter)) for rank in range(ranks)]
    if ranks == 1:
        got = shards[0].model(tokens)[:, -1]
    else:
        stages = [shard.stage for shard in shards if shard.stage is not None]
        hidden = stages[-1].embed(tokens)
        for stage in reversed(stages):
            hidden = stage.run(hidden, stage.make_cache())
        got = stages[0].logits(hidden)
    assert mx.allclose(got, wanted, atol=1e-4)
    assert not mx.allclose(got, without, atol=0.1)
    assert shards[0].loaded.note == f"{kind} adapter of rank 4 fused into the weights"
    names = [name for shard in shards for name, _ in tree_flatten(shard.model.parameters())]
    assert not any("lora" in name for name in names)


def test_an_adapter_of_embedding_and_head_is_told_apart_by_rank(model: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter", model, keys=[*KEYS, "model.embed_tokens", "lm_head"])
    plain = [dict(tree_flatten(load(model, rank, 2).model.parameters())) for rank in range(2)]
    adapted = [load(model, rank, 2, adapter=str(adapter)) for rank in range(2)]
    changed = [
        {name for name, array in tree_flatten(shard.model.parameters()) if not mx.array_equal(array, old[name])}
        for shard, old in zip(adapted, plain, strict=True)
    ]
    assert "lm_head.weight" in changed[0] and "model.embed_tokens.weight" in changed[1]
    assert not any(name.startswith("model.layers.0.") for name in changed[1]), "only the last three are adapted"


@pytest.mark.parametrize("sharding", list(Sharding))
def test_two_ranks_with_an_adapter_answer_as_one_process_does(sharding: Sharding, model: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter", model)
    expected = plain_mlx_lm(model, PROMPTS[:3], TOKENS, adapter)
    assert expected != plain_mlx_lm(model, PROMPTS[:3], TOKENS)
    with running(tmp_path, 2, sharding) as group:
        group.serve(model, adapter=str(adapter))
        for number, wanted in enumerate(expected):
            group[0].send(generate(str(number), PROMPTS[number], TOKENS))
            assert group[0].answer(str(number)).tokens == until_eos(wanted), f"prompt {number}"
        group[0].send(channel.Goodbye())
        assert [rank.exit_code() for rank in group.ranks] == [0, 0]


def config_of(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change(adapter: Path, how: Callable[[dict[str, Any]], object]) -> None:
    file = str(adapter / "adapters.safetensors")
    loaded: Any = mx.load(file)
    arrays = dict(loaded)
    mx.eval(arrays)
    how(arrays)
    mx.save_safetensors(file, arrays)


Q = "model.layers.2.self_attn.q_proj.lora_a"
DAMAGES: dict[str, tuple[Callable[[Path], object], Reason, str]] = {
    "no weights": (
        lambda a: (a / "adapters.safetensors").unlink(),
        Reason.MODEL_NOT_FOUND,
        "has no adapters.safetensors",
    ),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), Reason.MODEL_NOT_FOUND, "has no adapter_config.json"),
    "PEFT": (
        lambda a: (a / "adapters.safetensors").rename(a / "adapter_model.safetensors"),
        Reason.MODEL_NOT_FOUND,
        "is PEFT's form: convert it",
    ),
    "bad config": (lambda a: (a / "adapter_config.json").write_text("{"), Reason.MODEL_CORRUPT, "is damaged"),
    "no scale": (lambda a: config_of(a, lora_parameters={"rank": 4}), Reason.MODEL_CORRUPT, "rank, scale, dropout"),
    "another kind": (
        lambda a: config_of(a, fine_tune_type="full"),
        Reason.MODEL_UNSUPPORTED,
        "'full'; supported: lora, dora",
    ),
    "truncated": (
        lambda a: (a / "adapters.safetensors").write_bytes((a / "adapters.safetensors").read_bytes()[:-10]),
        Reason.MODEL_CORRUPT,
        "is damaged: tensor",
    ),
    "missing": (
        lambda a: change(a, lambda arrays: arrays.pop(Q)),
        Reason.MODEL_CORRUPT,
        f"lacks 1 tensors, such as {Q}",
    ),
    "extra": (
        lambda a: change(a, lambda arrays: arrays.update({"model.layers.9.mlp.up_proj.lora_a": mx.zeros((1, 1))})),
        Reason.MODEL_CORRUPT,
        "have no place, such as model.layers.9.mlp.up_proj.lora_a",
    ),
    "another shape": (
        lambda a: change(a, lambda arrays: arrays.update({Q: mx.zeros((3, 4))})),
        Reason.MODEL_CORRUPT,
        f"tensor {Q} of the adapter in",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_that_does_not_fit_is_refused(damage: str, ranks: int, model: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "adapter", model)
    how, reason, words = DAMAGES[damage]
    how(adapter)
    error = refused(model, 0, ranks, adapter=str(adapter))
    assert error.reason is reason
    assert words in error.message
