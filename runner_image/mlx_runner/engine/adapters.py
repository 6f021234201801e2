"""Low-rank adapters (LoRA, DoRA) of mlx-lm: read with its own code, strictly, and fused into the weights.

On a rank of a pipeline only the layers here are adapted. Fused before a model is split by tensors, an adapter is split
with it; and a forward pass costs no more than without one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import Span
from mlx_operator_api.names import ADAPTER_FIELD
from mlx_runner.download import adapter as files
from mlx_runner.download.adapter import Adapter
from mlx_runner.download.choice import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mlx_runner.download.result import ModelError

from .failures import EngineError
from .pipeline import Absent

_LEAVES = {"lora_a", "lora_b", "m"}


def inspect(path: Path) -> Adapter:
    """Judge an adapter's files before its tensors are read.

    Raises:
        EngineError: there is none, or it is damaged or of another kind.
    """
    try:
        with files.named():
            return files.inspect(path)
    except ModelError as error:
        raise EngineError(error.reason, error.message) from error


def apply(model: Any, layers: list[Any], part: Span, adapter: Adapter) -> None:
    """Fuse an adapter into what this rank holds of a model, `part` of its `layers`; nothing is computed yet.

    Raises:
        EngineError: its tensors are not those of this model.
    """
    elsewhere = {name for name, module in model.named_modules() if isinstance(module, Absent)}
    try:
        linear_to_lora_layers(
            _Held(model, layers, part), adapter.layers, adapter.parameters, use_dora=adapter.kind == "dora"
        )
    except ValueError as error:
        message = f"{ADAPTER_FIELD}: the adapter in {adapter.path}: {error}"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message) from error
    given: Any = mx.load(str(adapter.path / ADAPTER_WEIGHTS))
    names = [(name, array) for name, array in tree_flatten(model.parameters())]
    wanted = {name: array for name, array in names if name.rpartition(".")[2] in _LEAVES}
    _compare(adapter, wanted, {n: a for n, a in given.items() if n.rpartition(".")[0] not in elsewhere})
    nn.Module.load_weights(model, [(name, given[name]) for name in wanted], strict=False)
    fused = [(name, module.fuse(dequantize=True)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))


def _compare(adapter: Adapter, wanted: dict[str, Any], given: dict[str, Any]) -> None:
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        some = f"{len(missing)} tensors, such as {missing[0]}"
        message = f"{ADAPTER_FIELD}: {ADAPTER_WEIGHTS} of the adapter in {adapter.path} lacks {some}"
        raise EngineError(Reason.MODEL_CORRUPT, message)
    extra = sorted(given.keys() - wanted.keys())
    if extra:
        message = (
            f"{ADAPTER_FIELD}: the adapter in {adapter.path} is for another model or {ADAPTER_CONFIG}: "
            f"{len(extra)} of its tensors have no place, such as {extra[0]}"
        )
        raise EngineError(Reason.MODEL_CORRUPT, message)
    for name, parameter in wanted.items():
        if given[name].shape != parameter.shape:
            message = (
                f"{ADAPTER_FIELD}: tensor {name} of the adapter in {adapter.path} has shape {given[name].shape}, "
                f"this model asks for {parameter.shape}"
            )
            raise EngineError(Reason.MODEL_CORRUPT, message)


class _Held:
    """A model as mlx-lm's adapter code sees it, with nothing in the place of what other ranks hold."""

    def __init__(self, model: Any, layers: list[Any], part: Span) -> None:
        self._model = model
        self.layers = [layer if part.start <= number < part.end else nn.Module() for number, layer in enumerate(layers)]

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Those with something in them."""
        return ((name, module) for name, module in self._model.named_modules() if not isinstance(module, Absent))

    def update_modules(self, modules: Any) -> Any:
        """See mlx."""
        return self._model.update_modules(modules)
