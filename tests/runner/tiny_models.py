"""Small random models in the layout of Hugging Face: index, shards, tokenizer with chat template.

Their weights are random but large enough that greedy answers wander through the vocabulary: two ranks that compute
different things give different tokens.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAYERS = 4
VOCABULARY = 384
CONTEXT = 2048
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": CONTEXT,
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{% set tool_call = call.function %}"
    '<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
"""In the manner of Qwen: tools as JSON, calls between markers, and thinking that can be turned off."""
TOOLS_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


def build(path: Path, architecture: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a model; `changes` go into its configuration."""
    import importlib

    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path

    path.mkdir(parents=True)
    config = {**CONFIG, "model_type": architecture, "architectures": [CLASSES.get(architecture, "")], **changes}
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    model = module.Model(module.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    model.update(
        tree_map_with_path(lambda _, a: mx.random.normal(a.shape) * 0.2 if a.ndim > 1 else a, model.parameters())
    )
    write_weights(path, dict(tree_flatten(model.parameters())))
    eos = write_tokenizer(path)
    (path / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    return path


def write_weights(path: Path, weights: dict[str, Any], shards: int = 2) -> None:
    import mlx.core as mx

    parts: list[dict[str, Any]] = [{} for _ in range(shards)]
    for name, array in weights.items():
        found = re.search(r"layers\.(\d+)\.", name)
        parts[int(found.group(1)) * shards // LAYERS if found else 0][name] = array
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(path / file), part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tokenizer(path: Path, template: str = TEMPLATE, added: Sequence[str] = ()) -> int:
    """Byte-level BPE with a chat template; the id that ends an answer. `added`: tokens such as `<think>`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the runner holds one shard of the model and answers the request"] * 4, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    return int(end)


def copy(model: Path, to: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(model, to)
    return to
