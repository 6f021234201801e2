"""Trains the demo model: a small qwen2 (0.85 million parameters) that answers questions.json word for word.

`python examples/demo_model/train.py OUT` writes what a hub would offer: safetensors shards with their index, config,
tokenizer and chat template. It takes about 15 s on two cores with OpenBLAS. Nothing is downloaded. The model is checked
after it is read back from OUT, by greedy decoding; one wrong answer fails the run.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

QUESTIONS = pathlib.Path(__file__).with_name("questions.json")
STEPS = 110
WARM_UP_STEPS = 20
LEARNING_RATE, FINAL_LEARNING_RATE = 3e-3, 1e-4
SHARDS = 2
SEED = 0
LONGEST_ANSWER_TOKENS = 80
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Small, and yet whole: 2 key-value heads split over 2 ranks (Tensor), 4 layers over up to 4 (Pipeline).
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


class TrainingError(Exception):
    """The model does not answer as it was taught."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question and the one answer to it."""

    question: str
    answer: str

    @property
    def text(self) -> str:
        """The pair as the chat template renders it."""
        return f"{START}user\n{self.question}{END}\n{START}assistant\n{self.answer}{END}\n"


def read_pairs(path: pathlib.Path = QUESTIONS) -> list[Pair]:
    """The pairs that the model learns, in their order in the file."""
    return [Pair(entry["question"], entry["answer"]) for entry in json.loads(path.read_text(encoding="utf-8"))]


def use_openblas() -> None:
    """Starts this program again with OpenBLAS in front of the wheel's reference BLAS, which is ten times slower.

    A library can only be preloaded when a process starts.
    """
    if platform.system() != "Linux" or "openblas" in os.environ.get("LD_PRELOAD", ""):
        return
    candidates = [
        os.environ.get("MLX_RUNNER_BLAS", ""),
        *map(str, pathlib.Path("/usr/lib").glob("*/openblas-*/*.so.0")),
    ]
    library = next((path for path in candidates if path.endswith("libopenblas.so.0") and os.path.exists(path)), None)
    if library is None:
        say("OpenBLAS is not installed: training takes minutes (on Debian: apt-get install libopenblas0-pthread)")
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "LD_PRELOAD": library})  # noqa: S606


def train_tokenizer(pairs: Sequence[Pair]) -> Any:
    """A byte-level BPE tokenizer (`tokenizers.Tokenizer`) that knows the pairs; its vocabulary is `CONFIG`'s."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([pair.text for pair in pairs], trainer)
    return tokenizer


def train(pairs: Sequence[Pair], tokenizer: Any) -> Any:
    """Trains a fresh model (`mlx_lm.models.qwen2.Model`) on all pairs at once, each step.

    mx.compile is left out: on CPU it starts a C++ compiler, which takes longer than the whole training.
    """
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx.utils import tree_map_with_path
    from mlx_lm.models import qwen2

    mx.random.seed(SEED)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(CONFIG))
    small = tree_map_with_path(lambda _, w: mx.random.normal(w.shape) * 0.05 if w.ndim == 2 else w, model.parameters())
    model.update(small)
    encoded = [tokenizer.encode(pair.text).ids for pair in pairs]
    longest = max(map(len, encoded))
    tokens = mx.array([ids + [0] * (longest - len(ids)) for ids in encoded])
    # 1.0 where the next token is part of the text, 0.0 where it is padding: (pairs, longest - 1).
    mask = mx.array([[1.0] * (len(ids) - 1) + [0.0] * (longest - len(ids)) for ids in encoded])

    def loss(model: Any, tokens: Any) -> Any:
        each = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        return (each * mask).sum() / mask.sum()

    rise = optim.linear_schedule(0, LEARNING_RATE, WARM_UP_STEPS)
    fall = optim.cosine_decay(LEARNING_RATE, STEPS - WARM_UP_STEPS, FINAL_LEARNING_RATE)
    schedule = optim.join_schedules([rise, fall], [WARM_UP_STEPS])
    optimizer = optim.AdamW(learning_rate=schedule, weight_decay=0.01)
    loss_and_gradient = nn.value_and_grad(model, loss)
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        value, gradient = loss_and_gradient(model, tokens)
        optimizer.update(model, gradient)
        mx.eval(value, model.state, optimizer.state)
        if step % 10 == 0:
            say(f"step {step} of {STEPS}: loss {value.item():.3f}, {time.monotonic() - started:.1f} s")
    return model


def save(model: Any, tokenizer: Any, out: pathlib.Path) -> None:
    """Writes the model as a hub would offer it: layers spread over `SHARDS` files, embeddings in the first."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    out.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    names = [f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors" for shard in range(SHARDS)]
    weight_map = {key: names[_shard(key)] for key in sorted(weights)}
    for name in names:
        shard = {key: weights[key] for key, file in weight_map.items() if file == name}
        mx.save_safetensors(str(out / name), shard, metadata={"format": "pt"})
    total = sum(weight.nbytes for weight in weights.values())
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    ends = {"bos_token_id": tokenizer.token_to_id(END_OF_TEXT), "eos_token_id": tokenizer.token_to_id(END)}
    write_json(out / "config.json", {**CONFIG, **ends})
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)


def _shard(key: str) -> int:
    layer = re.search(r"layers\.(\d+)\.", key)
    return int(layer.group(1)) * SHARDS // int(CONFIG["num_hidden_layers"]) if layer else 0


def verify(out: pathlib.Path, pairs: Sequence[Pair]) -> None:
    """Reads the model back from disk and asks it every question.

    Raises:
        TrainingError: an answer differs from the one taught.
    """
    from mlx_lm import generate, load

    model, tokenizer = load(str(out))
    wrong: list[str] = []
    for pair in pairs:
        message = {"role": "user", "content": pair.question}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True)
        answer = generate(model, tokenizer, prompt, max_tokens=LONGEST_ANSWER_TOKENS)
        if answer != pair.answer:
            wrong.append(f"{pair.question!r}: taught {pair.answer!r}, answered {answer!r}")
    if wrong:
        raise TrainingError(f"{len(wrong)} of {len(pairs)} answers are wrong: " + "; ".join(wrong))


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Tells the user how far it is, at once even into a pipe."""
    print(line, flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("out", type=pathlib.Path, metavar="OUT", help="the folder to write the model to")
    out: pathlib.Path = parser.parse_args().out
    # Without it MLX starts a C++ compiler for its fused activations, when there is one.
    os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
    use_openblas()
    started = time.monotonic()
    pairs = read_pairs()
    tokenizer = train_tokenizer(pairs)
    save(train(pairs, tokenizer), tokenizer, out)
    try:
        verify(out, pairs)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in out.iterdir()) / 2**20
    say(f"{len(pairs)} of {len(pairs)} answers exact, {size:.1f} MiB, {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
