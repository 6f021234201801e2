"""Positions that a model was made for: how many, and what becomes of those beyond a table of them."""

from typing import Any

import mlx.core as mx

from . import anatomy

_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""How configurations call it; where several do, the first."""
_DEFAULT = 4096
"""For a model whose configuration names no limit."""
_TABLE = "wpe"
"""Of the models that learn a vector for each position (GPT-2's family)."""


def of(config: dict[str, Any]) -> int:
    """Positions that config.json names."""
    inner = config.get("text_config")
    places = (config, inner if isinstance(inner, dict) else {})
    found = (place.get(key) for key in _KEYS for place in places)
    return next((value for value in found if isinstance(value, int) and value > 0), _DEFAULT)


def bound(model: Any) -> None:
    """Let a table of positions give its last vector for all beyond: MLX would read what lies behind it in memory.

    Such positions come from a `contextLength` beyond the model's own, and from the padding of a row that ends sooner.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == _TABLE and "weight" in module:
            _bound(module, module.weight.shape[0] - 1)


def _bound(table: Any, last: int) -> None:
    look_up = type(table).__call__

    def inside(self: Any, positions: Any) -> Any:
        return look_up(self, mx.clip(positions, 0, last))

    anatomy.swap(table, __call__=inside)
