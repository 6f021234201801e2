"""Which files a rank fetches: by the names that models give their tensors, and generous where a name says nothing."""

from pathlib import Path

import pytest

from mlx_operator_api.layers import TooFewLayersError
from mlx_operator_api.tasks import Sharding
from mlx_runner.download import choice
from mlx_runner.download.request import Request

FIRST, LAST, ALL = {1}, {0}, {0, 1}


def holders(tensor: str, *, others: tuple[str, ...] = ("lm_head.weight",), tied: bool = False) -> set[int]:
    """Ranks of a pipeline of two, over four layers, that fetch the file of a tensor."""
    weight_map = {tensor: "this"} | {other: "another" for other in others if other != tensor}
    asked = Request(source="hf://a/b", model_dir=Path("/m"), cache_dir=Path("/c"), memory=Path("/h"), world_size=2)
    ranks = (asked.model_copy(update={"rank": rank}) for rank in (0, 1))
    return {r.rank for r in ranks if "this" in choice.mine(r, weight_map, 4, tied=tied)}


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", FIRST),
        ("model.layers.3.mlp.down_proj.weight", LAST),
        ("model.layers.4.eh_proj.weight", LAST),  # one beyond the last: for guessing tokens ahead
        ("language_model.model.layers.1.mlp.up_proj.weight", FIRST),
        ("model.language_model.layers.2.mlp.up_proj.weight", LAST),
        ("transformer.h.1.attn.c_attn.weight", FIRST),
        ("h.2.ln_1.weight", LAST),
        ("backbone.layers.2.mixer.in_proj.weight", LAST),
        ("model.embed_tokens.weight", FIRST),
        ("transformer.wte.weight", FIRST),
        ("model.tok_embeddings.weight", FIRST),
        ("model.norm.weight", LAST),
        ("transformer.ln_f.bias", LAST),
        ("lm_head.weight", LAST),
        ("lm_head.scales", LAST),
        ("output.weight", LAST),
        # What the names do not tell, or tell of other parts than the text model.
        ("model.embed_tokens_per_layer.weight", ALL),
        ("model.visual.blocks.3.attn.qkv.weight", ALL),
        ("vision_tower.encoder.layers.0.mlp.weight", ALL),
        ("transformer.encoder.layers.0.mlp.weight", ALL),
        ("multi_modal_projector.weight", ALL),
        ("model.layers.scale", ALL),
        ("x", ALL),
    ],
)
def test_a_tensor_goes_to_the_ranks_that_need_it(tensor: str, expected: set[int]) -> None:
    assert holders(tensor) == expected


def test_an_embedding_that_is_also_the_head_is_needed_at_both_ends() -> None:
    embedding = "model.embed_tokens.weight"
    assert holders(embedding, others=("model.norm.weight",)) == ALL
    assert holders(embedding, tied=True) == ALL


def test_one_runner_a_tensor_group_and_an_unknown_number_of_layers_need_everything() -> None:
    asked = Request(source="hf://a/b", model_dir=Path("/m"), cache_dir=Path("/c"), memory=Path("/h"))
    weight_map = {"model.layers.0.a": "one", "model.layers.3.a": "two"}
    everything = frozenset({"one", "two"})
    assert choice.mine(asked, weight_map, 4, tied=False) == everything
    tensor = asked.model_copy(update={"world_size": 2, "sharding": Sharding.TENSOR})
    assert choice.mine(tensor, weight_map, 4, tied=False) == everything
    pipeline = asked.model_copy(update={"world_size": 2})
    assert choice.mine(pipeline, weight_map, 0, tied=False) == everything
    assert choice.mine(pipeline, weight_map, 4, tied=False) == {"two"}
    with pytest.raises(TooFewLayersError, match="1 layers, too few for a pipeline of 2 ranks"):
        choice.mine(pipeline, weight_map, 1, tied=False)


@pytest.mark.parametrize(
    ("name", "small", "weights"),
    [
        ("config.json", True, False),
        ("generation_config.json", True, False),
        ("tokenizer.model", True, False),
        ("qwen.tiktoken", True, False),
        ("merges.txt", True, False),
        ("chat_template.jinja", True, False),
        ("additional_chat_templates/tool_use.jinja", True, False),
        ("model.safetensors.index.json", True, False),
        ("model.safetensors", False, True),
        ("model-00001-of-00002.safetensors", False, True),
        ("consolidated.safetensors", False, False),
        ("adapter_model.safetensors", False, False),
        ("adapters.safetensors", False, False),
        ("pytorch_model.bin", False, False),
        ("modeling_x.py", False, False),
        ("onnx/config.json", False, False),
        ("original/model.safetensors", False, False),
        ("../config.json", False, False),
        ("/etc/model.json", False, False),
        ("..", False, False),
        (".gitattributes", False, False),
        ("a\n.json", False, False),
    ],
)
def test_names_say_what_is_fetched(name: str, small: bool, weights: bool) -> None:
    assert (choice.small(name), choice.weights(name)) == (small, weights)
