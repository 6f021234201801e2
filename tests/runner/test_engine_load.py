"""Loading a shard: all of it or a failure that names what is wrong. In this process: nothing here needs a group."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Sharding
from mlx_runner.channel import Generate, LayerLoaded, Load
from mlx_runner.engine import imports

from . import architectures, tiny_models

imports.import_all()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.cache import ChunkedKVCache  # noqa: E402

from mlx_runner.engine import anatomy, positions  # noqa: E402
from mlx_runner.engine import load as loading  # noqa: E402
from mlx_runner.engine.failures import EngineError  # noqa: E402
from mlx_runner.engine.prepare import Limits, Preparer  # noqa: E402
from mlx_runner.engine.text import PromptError, load_tokenizer  # noqa: E402

Tiny = Callable[[str], Path]


def command(model: Path, rank: int = 0, world_size: int = 1, **options: Any) -> Load:
    options.setdefault("sharding", Sharding.PIPELINE)
    options.setdefault("prompt_cache_bytes", 0)
    return Load(
        path=str(model), served_name="m", rank=rank, world_size=world_size, max_concurrent_requests=4, **options
    )


def load(model: Path, rank: int = 0, world_size: int = 1, **options: Any) -> loading.Shard:
    return loading.load(command(model, rank, world_size, **options), None, lambda event: None)


def refused(model: Path, rank: int = 0, world_size: int = 1, group: Any = None, **options: Any) -> EngineError:
    with pytest.raises(EngineError) as raised:
        loading.load(command(model, rank, world_size, **options), group, lambda event: None)
    return raised.value


def names(shard: loading.Shard) -> set[str]:
    return {name for name, _ in tree_flatten(shard.model.parameters())}


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "qwen3"])
def test_the_stages_of_a_pipeline_hold_every_tensor_and_only_a_tied_embedding_twice(
    tiny: Tiny, architecture: str
) -> None:
    whole = names(load(tiny(architecture)))
    stages = [names(load(tiny(architecture), rank, 3)) for rank in range(3)]
    assert set.union(*stages) == whole
    tied = {"model.embed_tokens.weight"} if architecture != "llama" else set()
    assert stages[0] & stages[2] == tied
    assert not any("embed" in name or name.split(".", 1)[1] == "norm.weight" for name in stages[1])
    assert all("lm_head" not in name for name in stages[1] | stages[2])


def test_progress_is_told_layer_by_layer(tiny: Tiny) -> None:
    told: list[LayerLoaded] = []
    shard = loading.load(command(tiny("qwen2"), 1, 2), None, told.append)
    assert [(event.loaded, event.total, event.layers) for event in told] == [(1, 2, "0-1"), (2, 2, "0-1")]
    assert (shard.loaded.layers, shard.loaded.layers_total) == ("0-1", 2)
    assert shard.loaded.bytes == sum(a.nbytes for _, a in tree_flatten(shard.model.parameters()))
    assert shard.loaded.note is None
    assert shard.context_length == tiny_models.CONTEXT


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_positions": 64, "n_ctx": 32}, 64),
        ({"n_ctx": 64}, 64),
        ({"max_seq_len": 64}, 64),
        ({"seq_length": 64}, 64),
        ({"max_sequence_length": 64}, 64),
        ({"seq_length": 32, "max_position_embeddings": 64}, 64),
        ({"n_ctx": 32, "text_config": {"max_position_embeddings": 64}}, 64),
        ({"text_config": {"n_positions": 64}}, 64),
        ({"n_positions": 0, "text_config": "none"}, 4096),
        ({}, 4096),
    ],
)
def test_the_positions_of_a_model_are_read_whatever_its_configuration_calls_them(
    config: dict[str, Any], expected: int
) -> None:
    assert positions.of(config) == expected


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of 64 positions, of which its configuration speaks as GPT-2's does."""
    path = tmp_path_factory.mktemp("gpt2") / "model"
    return architectures.save(path, "gpt2", max_position_embeddings=None, n_positions=64, n_ctx=64)


def test_a_request_beyond_the_table_of_positions_is_refused(gpt2: Path) -> None:
    shard = load(gpt2)
    assert (shard.context_length, shard.budget.context) == (64, 64)
    limits = Limits.of(command(gpt2), shard.budget.context)
    preparer = Preparer(load_tokenizer(gpt2, shard.config), limits)
    assert preparer.prepare(Generate(id="fits", prompt=(5,) * 60, max_tokens=4)).max_tokens == 4
    with pytest.raises(PromptError) as raised:
        preparer.prepare(Generate(id="longer", prompt=(5,) * 60, max_tokens=5))
    assert raised.value.code == "context_length_exceeded"


@pytest.mark.parametrize("world_size", [1, 2])
def test_positions_beyond_the_table_are_all_the_last_one(gpt2: Path, world_size: int) -> None:
    shard = load(gpt2, world_size - 1, world_size, context_length=128)
    table = shard.model.model.wpe
    assert mx.array_equal(table(mx.array([62, 63, 64, 10**6])), table.weight[mx.array([62, 63, 63, 63])])


def test_a_path_that_is_no_model_is_not_found(tmp_path: Path) -> None:
    error = refused(tmp_path / "absent")
    assert (error.reason, "no directory" in error.message) == (Reason.MODEL_NOT_FOUND, True)
    (tmp_path / "notes.txt").write_text("")
    error = refused(tmp_path)
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert "config.json" in error.message and "notes.txt" in error.message
    (tmp_path / "config.json").write_text("{}")
    error = refused(tmp_path)
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert "model*.safetensors" in error.message


def second(model: Path) -> Path:
    return model / "model-00002-of-00002.safetensors"


def truncate(model: Path) -> str:
    file = second(model)
    file.write_bytes(file.read_bytes()[:-100])
    return f"{file.name} is damaged"


def empty(model: Path) -> str:
    second(model).write_bytes(b"")
    return f"{second(model).name} is damaged"


def garbage(model: Path) -> str:
    second(model).write_bytes(b"\x01" * 4096)
    return f"{second(model).name} is damaged"


def remove_file(model: Path) -> str:
    second(model).unlink()
    return f"{second(model).name} is missing: the index expects tensor model.layers.2"


def tensors(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return dict(loaded)


def remove_tensor(model: Path) -> str:
    weights = tensors(second(model))
    del weights["model.layers.3.mlp.up_proj.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(second(model)), weights)
    return f"tensor model.layers.3.mlp.up_proj.weight is not in {second(model).name}"


def wrong_shape(model: Path) -> str:
    weights = tensors(second(model))
    weights["model.layers.2.mlp.up_proj.weight"] = mx.zeros((100, 64))
    mx.eval(weights)
    mx.save_safetensors(str(second(model)), weights)
    return "tensor model.layers.2.mlp.up_proj.weight in model-00002-of-00002.safetensors has shape (100, 64)"


def bad_index(model: Path) -> str:
    (model / "model.safetensors.index.json").write_text('{"weight_map": [')
    return "model.safetensors.index.json cannot be read"


def bad_config(model: Path) -> str:
    (model / "config.json").write_text("{")
    return "config.json cannot be read"


def config_without_a_field(model: Path) -> str:
    change_config(model, hidden_size=None)
    return "config.json does not fit its model_type"


def fewer_layers(model: Path) -> str:
    change_config(model, num_hidden_layers=3)
    return "tensors that config.json knows nothing of, such as model.layers.3"


def more_layers(model: Path) -> str:
    change_config(model, num_hidden_layers=5)
    return "tensor model.layers.4"


def change_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        garbage,
        remove_file,
        remove_tensor,
        wrong_shape,
        bad_index,
        bad_config,
        config_without_a_field,
        fewer_layers,
        more_layers,
    ],
)
def test_damage_is_found_before_anything_is_read_and_named(
    tmp_path: Path, tiny: Tiny, damage: Callable[[Path], str]
) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    words = damage(model)
    told: list[LayerLoaded] = []
    with pytest.raises(EngineError) as raised:
        loading.load(command(model), None, told.append)
    assert raised.value.reason is Reason.MODEL_CORRUPT
    assert words in raised.value.message
    assert told == []


def test_a_rank_needs_only_the_files_of_its_own_layers(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("llama"), tmp_path / "model")
    second(model).unlink()
    assert load(model, 1, 2).loaded.layers == "0-1"
    assert second(model).name in refused(model, 0, 2).message


@pytest.mark.parametrize(
    ("changes", "rank", "world_size", "words"),
    [
        ({"model_type": "foobar9000"}, 0, 1, "model_type 'foobar9000' is not known to mlx-lm"),
        ({"model_type": None}, 0, 1, "names no model_type"),
        ({"model_file": "own.py"}, 0, 1, "brings its own code"),
        ({}, 0, 5, "the model has 4 layers, too few for a pipeline of 5 ranks"),
    ],
)
def test_what_cannot_be_run_is_unsupported_and_says_what_is(
    tmp_path: Path, tiny: Tiny, changes: dict[str, Any], rank: int, world_size: int, words: str
) -> None:
    model = tiny_models.copy(tiny("llama"), tmp_path / "model")
    change_config(model, **changes)
    error = refused(model, rank, world_size)
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert words in error.message


def test_a_cache_that_holds_one_request_only_is_unsupported(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "make_prompt_cache", lambda model: [ChunkedKVCache(8)])
    for world_size, words in ((1, "cannot be served"), (2, "cannot be split into a pipeline")):
        error = refused(tiny("qwen2"), 0, world_size)
        assert error.reason is Reason.MODEL_UNSUPPORTED
        assert words in error.message
        assert "ChunkedKVCache, which cannot hold several requests" in error.message
    assert "tested in a pipeline: afmoe, " in error.message


class Three:
    """A group of three, for what is refused before anything is split."""

    def size(self) -> int:
        return 3


def test_heads_that_do_not_divide_by_the_ranks_are_unsupported_with_tensor(tiny: Tiny) -> None:
    error = refused(tiny("qwen2"), 0, 3, group=Three(), sharding=Sharding.TENSOR)
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert "num_attention_heads 4 is not divisible by 3 ranks" in error.message


def test_an_architecture_without_a_tensor_split_is_unsupported_with_tensor(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    weights = {k: v for k, v in load_all(model).items() if not k.endswith("bias")}
    tiny_models.write_weights(model, weights)
    change_config(model, model_type="gemma")
    error = refused(model, 0, 3, group=Three(), sharding=Sharding.TENSOR)
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert "gemma cannot be split by tensors" in error.message


def load_all(model: Path) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    for file in model.glob("*.safetensors"):
        weights |= tensors(file)
    mx.eval(weights)
    return weights


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="only CPUs need float32")
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_is_cast_on_cpu_and_said(tmp_path: Path, tiny: Tiny, kind: str) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    weights = {name: array.astype(getattr(mx, kind)) for name, array in load_all(model).items()}
    tiny_models.write_weights(model, weights)
    shard = load(model)
    assert shard.loaded.note == f"cast from {kind} to float32 on CPU"
    parameters = dict(tree_flatten(shard.model.parameters()))
    assert {array.dtype for array in parameters.values()} == {mx.float32}
    for name, array in parameters.items():
        assert mx.array_equal(array, weights[name].astype(mx.float32)), name


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="only CPUs need float32")
def test_a_quantized_model_is_cast_on_cpu_and_said(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    quantized = load(tiny("qwen2")).model
    nn.quantize(quantized, group_size=32, bits=8)
    tiny_models.write_weights(model, dict(tree_flatten(quantized.parameters())))
    change_config(model, quantization={"group_size": 32, "bits": 8})
    shard = load(model, 1, 2)
    assert shard.loaded.note == "cast from quantized to float32 on CPU"
    original = dict(tree_flatten(load(tiny("qwen2"), 1, 2).model.parameters()))
    parameters = dict(tree_flatten(shard.model.parameters()))
    assert parameters.keys() == original.keys()
    for name, array in parameters.items():
        assert mx.allclose(array, original[name], atol=0.02), name


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")

    def shorten(event: LayerLoaded) -> None:
        os.truncate(second(model), 4096)

    with pytest.raises(EngineError) as raised:
        loading.load(command(model), None, shorten)
    assert raised.value.reason is Reason.MODEL_CORRUPT
    assert "the weights of layer 2 cannot be read from" in raised.value.message


def test_a_file_that_goes_away_while_it_is_read_changes_nothing(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    shard = loading.load(command(model), None, lambda event: second(model).unlink(missing_ok=True))
    whole = dict(tree_flatten(load(tiny("qwen2")).model.parameters()))
    assert all(mx.array_equal(array, whole[name]) for name, array in tree_flatten(shard.model.parameters()))


def test_a_parameter_that_the_loader_left_out_is_found(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    original = nn.Module.load_weights

    def forgetful(self: Any, given: list[tuple[str, Any]], strict: bool = True) -> Any:
        return original(self, [item for item in given if item[0] != "model.norm.weight"], strict=strict)

    monkeypatch.setattr(nn.Module, "load_weights", forgetful)
    error = refused(tiny("qwen2"))
    assert error.reason is Reason.LOAD_FAILED
    assert error.message == "1 parameters were not loaded from the files, such as model.norm.weight"


def test_integers_where_the_model_computes_with_floats_are_damage(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    arrays = load_all(model)
    arrays[name] = arrays[name].astype(mx.int32)
    tiny_models.write_weights(model, arrays)
    error = refused(model)
    assert error.reason is Reason.MODEL_CORRUPT
    assert f"tensor {name} in model-00001-of-00002.safetensors is of type int32" in error.message
    assert load(model, 0, 2).loaded.layers == "2-3", "a rank that does not hold it can load"


def test_the_form_of_the_files_is_known_without_those_of_other_ranks(tmp_path: Path) -> None:
    """Experts are stored one by one; mlx-lm looks at layer 0 to tell, and this rank's files begin at layer 2."""
    model = tiny_models.build(
        tmp_path / "model",
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    )
    stacked = load_all(model)
    single: dict[str, Any] = {}
    for name, array in stacked.items():
        before, found, after = name.partition("switch_mlp.")
        if found:
            single |= {f"{before}experts.{number}.{after}": array[number] for number in range(4)}
        else:
            single[name] = array
    tiny_models.write_weights(model, single)
    whole = dict(tree_flatten(load(model).model.parameters()))
    (model / "model-00001-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="embed_tokens"):
        load(model, 0, 2)  # its head is the embedding, which is in the other file
    change_config(model, tie_word_embeddings=False)
    head = {"lm_head.weight": stacked["model.embed_tokens.weight"], "model.norm.weight": stacked["model.norm.weight"]}
    mx.save_safetensors(str(model / "model-extra.safetensors"), head)
    shard = load(model, 0, 2)
    arrays = dict(tree_flatten(shard.model.parameters()))
    assert any("switch_mlp" in name for name in arrays)
    assert all(mx.array_equal(array, whole[name]) for name, array in arrays.items() if name in whole)


def test_a_missing_or_damaged_tokenizer_is_told(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(EngineError, match=r"tokenizer\.json") as raised:
        load_tokenizer(model, {"vocab_size": 384})
    assert raised.value.reason is Reason.MODEL_CORRUPT
    (model / "tokenizer.json").unlink()  # transformers alone would make up an empty one
    with pytest.raises(EngineError, match="has no tokenizer: none of") as raised:
        load_tokenizer(model, {"vocab_size": 384})
    assert raised.value.reason is Reason.MODEL_CORRUPT
