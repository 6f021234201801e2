"""A tiny random model of every architecture of the table in docs/models.md.

`COMMON` answers what most configurations ask for (each takes only the fields it knows), `ARCHITECTURES` the rest.
Windows are shorter than the prompts of the tests, and the layers of different kinds where an architecture has them.
"""

import importlib
import json
from pathlib import Path
from typing import Any

from . import tiny_models
from .tiny_models import CONFIG

KINDS = ["sliding_attention", "full_attention"] * 2
COMMON: dict[str, Any] = {
    **CONFIG,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "bias": False,
    "qkv_bias": False,
    "partial_rotary_factor": 1.0,
    "rotary_pct": 0.5,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "silu",
    # Attention of several kinds.
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "layer_types": KINDS,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "use_qk_norm": True,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    # Compressed keys and values.
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # Recurrent layers.
    "full_attention_interval": 2,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "state_size": 8,
    "conv_kernel": 4,
    "time_step_rank": 8,
    "use_conv_bias": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "full_attn_idxs": [1, 3],
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    # The names of older ones.
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 2048,
    "n_ctx": 2048,
}
_GEMMA3 = {"sliding_window": 8, "sliding_window_pattern": 2, **CONFIG}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {"post_norm": False, "qk_norm": True},
    "bailing_moe": {},
    "cohere": {},
    "cohere2": {},
    "deepseek": {},
    "deepseek_v2": {"topk_method": "greedy", "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "deepseek_v3": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone": {"num_layers": 4},
    "exaone4": {"sliding_window_pattern": "LG", "rope_scaling": {"type": "default"}},
    "falcon_h1": {},
    "gemma": {},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3": {"text_config": {"model_type": "gemma3_text", **_GEMMA3}},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"rope_scaling": None},
    "glm4_moe_lite": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "lfm2": {},
    "lfm2_moe": {"use_expert_bias": False, "num_dense_layers": 1, "layer_types": None},
    "llama": {},
    "llama4_text": {"intermediate_size_mlp": 128, "no_rope_layers": [1, 1, 1, 0]},
    "mamba": {},
    "mimo": {},
    "minicpm": {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 12.0},
    "minimax": {"rotary_dim": 8},
    "ministral3": {
        "rope_parameters": {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
    },
    "mixtral": {},
    "nanochat": {},
    "nemotron": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"use_qkv_bias": False},
    "starcoder2": {},
    "step3p5": {"num_attention_groups": 2},
    "telechat3": {},
    "youtu_llm": {},
}


def config(architecture: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a tiny model."""
    return {**COMMON, **ARCHITECTURES[architecture], "model_type": architecture, **changes}


def build(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model, as mlx-lm computes it; the same for the same seed."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config(architecture, **changes)))

    def weight(_: str, array: Any) -> Any:
        if array.ndim > 1 and mx.issubdtype(array.dtype, mx.floating):
            return mx.random.normal(array.shape) * 0.2
        return array

    model.update(tree_map_with_path(weight, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def save(path: Path, architecture: str, **changes: Any) -> Path:
    """Write such a model as Hugging Face has them, with a tokenizer."""
    from mlx.utils import tree_flatten

    path.mkdir(parents=True)
    tiny_models.write_weights(path, dict(tree_flatten(build(architecture, **changes).parameters())))
    eos = tiny_models.write_tokenizer(path)
    (path / "config.json").write_text(json.dumps({**config(architecture, **changes), "eos_token_id": eos}))
    return path
