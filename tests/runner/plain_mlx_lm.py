"""The oracle: mlx-lm as it is, one sequence at a time, greedy.

python plain_mlx_lm.py MODEL PROMPTS TOKENS ADAPTER → JSON; ADAPTER may be empty.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def main(path: str, prompts: list[list[int]], count: int, adapter: str) -> None:
    """Answer every prompt."""
    from pathlib import Path

    model, _ = load_model(Path(path))
    if adapter:
        load_adapters(model, adapter)
    answers = []
    for prompt in prompts:
        steps = generate_step(mx.array(prompt), model, max_tokens=count)
        answers.append([int(token) for token, _ in steps])
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
