"""The oracle: one plain mlx-lm process answers every trained question, greedy.

python single_process.py MODEL QUESTIONS [ADAPTER] → JSON [[question, answer, tokens], …]
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from mlx_lm import load, stream_generate


def main(model_path: str, questions: Path, adapter: str | None = None) -> None:
    """Ask all questions, one after the other."""
    model, tokenizer, *_ = load(model_path, adapter_path=adapter)
    rows = []
    for pair in json.loads(questions.read_text()):
        messages = [{"role": "user", "content": pair["question"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        text, count = "", 0
        for part in stream_generate(model, tokenizer, prompt, max_tokens=100):
            text, count = text + part.text, part.generation_tokens
        rows.append([pair["question"], text, count])
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
