"""One rank of a tensor group over MLX's ring: python tensor_table.py RANKS ARCHITECTURE... → JSON on rank 0.

For each architecture that mlx-lm can shard, the largest difference of the logits to those of the whole model.
"""

import json
import sys
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from tests.runner import architectures

TOKENS = ([5, 6, 7, 8, 9, 10, 300] * 3, [11], [12])
DIVISIBLE_BY_THREE = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_attention_groups": 3,
    "hidden_size": 96,
    "intermediate_size": 192,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "linear_num_value_heads": 3,
    "linear_num_key_heads": 3,
}


def difference(architecture: str, group: Any) -> tuple[float, bool]:
    """Largest difference of a logit, and whether greedy tokens are the same."""
    changes = DIVISIBLE_BY_THREE if group.size() == 3 else {}
    whole, sharded = (architectures.build(architecture, **changes) for _ in range(2))
    sharded.shard(group)
    ours, theirs = make_prompt_cache(sharded), make_prompt_cache(whole)
    worst, equal = 0.0, True
    for tokens in TOKENS:
        got = sharded(mx.array([tokens]), cache=ours)[:, -1]
        wanted = whole(mx.array([tokens]), cache=theirs)[:, -1]
        mx.eval(got, wanted)
        relative: Any = (mx.abs(got - wanted).max() / mx.abs(wanted).max()).item()
        worst = max(worst, float(relative))
        equal = equal and got.argmax().item() == wanted.argmax().item()
    return worst, equal


def main(names: list[str]) -> None:
    """Try all."""
    mx.disable_compile()
    group = mx.distributed.init(strict=True, backend="ring")
    found = {name: difference(name, group) for name in names}
    if group.rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
