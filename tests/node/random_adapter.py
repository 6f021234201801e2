"""A LoRA adapter of random numbers, as mlx-lm's training writes one: answers differ, and are the same each time.

python random_adapter.py MODEL ADAPTER
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

LAYERS = 4
PARAMETERS = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}


def main(model: Path, adapter: Path) -> None:
    """Write the two files of an adapter."""
    base, _ = load_model(model)
    linear_to_lora_layers(base, LAYERS, PARAMETERS)
    mx.random.seed(3)
    leaves = {name: leaf for name, leaf in tree_flatten(base.parameters()) if name.endswith(("lora_a", "lora_b"))}
    adapter.mkdir(parents=True)
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": PARAMETERS}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    arrays = {name: mx.random.normal(leaf.shape) * 0.1 for name, leaf in leaves.items()}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
