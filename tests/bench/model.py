"""A random qwen2 of 94 million parameters: its speed is that of a trained one, and nothing has to be downloaded."""

import json
import random
from pathlib import Path
from typing import Any

VOCABULARY = 8000
_EOS = "<|im_end|>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = 20_000
_CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 768,
    "num_hidden_layers": 14,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def build(path: Path) -> Path:
    """Write it, if it is not there yet."""
    done = path / "config.json"  # written last
    if not done.exists():
        path.mkdir(parents=True, exist_ok=True)
        eos = _write_tokenizer(path)
        _write_weights(path)
        done.write_text(json.dumps({**_CONFIG, "eos_token_id": eos}))
    return path


def words(seed: int, count: int) -> list[str]:
    """Words of the language that the tokenizer knows."""
    dice = random.Random(seed)  # noqa: S311
    return ["".join(dice.choices(_LETTERS, k=dice.randint(2, 9))) for _ in range(count)]


class Prompts:
    """Texts of a given number of tokens, never the same one twice: no cache of prompts may help either server."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self._made = 0

    def make(self, tokens: int) -> str:
        """A new text of about so many tokens."""
        self._made += 1
        ids = self._tokenizer.encode(" ".join(words(self._made + _WORDS, tokens))).ids
        return str(self._tokenizer.decode(ids[:tokens]))


def _write_tokenizer(path: Path) -> int:
    # Letters only: every token of an answer is text at once, so a first token is also a first piece of text.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", _EOS],
        initial_alphabet=list(_LETTERS),
        show_progress=False,
    )
    corpus = words(0, _WORDS)
    tokenizer.train_from_iterator((" ".join(corpus[i : i + 20]) for i in range(0, _WORDS, 20)), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"a vocabulary of {tokenizer.get_vocab_size()}, not {VOCABULARY}: some tokens have no text")
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _EOS, "pad_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    eos = tokenizer.token_to_id(_EOS)
    assert eos is not None
    return int(eos)


def _write_weights(path: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models import qwen2

    mx.random.seed(0)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(_CONFIG))
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.05 if a.ndim > 1 else a, model.parameters()))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(path / "model.safetensors"), weights, {"format": "pt"})
    # mlx_lm.server shards nothing without it.
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
