"""Low-rank adapters (LoRA, DoRA) of mlx-lm: read with its own code, strictly, and fused into the weights.

On a rank of a pipeline only the layers here are adapted. Fused before a model is split by tensors, an adapter is split
with it; and a forward pass costs no more than without one.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import Span
from mlx_runner.download import safetensors

from .failures import EngineError
from .pipeline import Absent

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
_PEFT = "adapter_model.safetensors"
_LEAVES = {"lora_a", "lora_b", "m"}
_FIELDS = ("rank", "scale", "dropout")
_TYPES = ("lora", "dora")


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a directory holds."""

    path: Path
    kind: str
    layers: int
    """How many of the last layers are adapted."""
    parameters: dict[str, Any]


def inspect(path: Path) -> Adapter:
    """Judge an adapter's files before its tensors are read.

    Raises:
        EngineError: there is none, or it is damaged or of another kind.
    """
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            peft = f" ({_PEFT} is PEFT's form: convert it to mlx-lm's)" if (path / _PEFT).is_file() else ""
            raise EngineError(Reason.MODEL_NOT_FOUND, f"the adapter in {path} has no {name}{peft}")
    try:
        safetensors.tensors(path / WEIGHTS)
        config = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise EngineError(Reason.MODEL_CORRUPT, f"the adapter in {path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise EngineError(Reason.MODEL_CORRUPT, f"{CONFIG} of the adapter in {path} holds no JSON object")
    kind = config.get("fine_tune_type", _TYPES[0])
    if kind not in _TYPES:
        message = f"the adapter in {path} has fine_tune_type {kind!r}; supported: {', '.join(_TYPES)}"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message)
    layers, parameters = config.get("num_layers"), config.get("lora_parameters")
    known = isinstance(parameters, dict) and all(isinstance(parameters.get(field), int | float) for field in _FIELDS)
    if not isinstance(layers, int) or not isinstance(parameters, dict) or not known:
        needed = f"num_layers and lora_parameters with {', '.join(_FIELDS)}"
        raise EngineError(Reason.MODEL_CORRUPT, f"{CONFIG} of the adapter in {path} lacks some of {needed}")
    return Adapter(path, kind, layers, parameters)


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
        raise EngineError(Reason.MODEL_UNSUPPORTED, f"the adapter in {adapter.path}: {error}") from error
    given: Any = mx.load(str(adapter.path / WEIGHTS))
    names = [(name, array) for name, array in tree_flatten(model.parameters())]
    wanted = {name: array for name, array in names if name.rpartition(".")[2] in _LEAVES}
    _compare(adapter, wanted, {n: a for n, a in given.items() if n.rpartition(".")[0] not in elsewhere})
    nn.Module.load_weights(model, [(name, given[name]) for name in wanted], strict=False)
    fused = [(name, module.fuse(dequantize=True)) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))


def _compare(adapter: Adapter, wanted: dict[str, Any], given: dict[str, Any]) -> None:
    missing = sorted(wanted.keys() - given.keys())
    if missing:
        message = f"{WEIGHTS} of the adapter in {adapter.path} lacks {len(missing)} tensors, such as {missing[0]}"
        raise EngineError(Reason.MODEL_CORRUPT, message)
    extra = sorted(given.keys() - wanted.keys())
    if extra:
        message = (
            f"the adapter in {adapter.path} is for another model or {CONFIG}: {len(extra)} of its tensors have no "
            f"place, such as {extra[0]}"
        )
        raise EngineError(Reason.MODEL_CORRUPT, message)
    for name, parameter in wanted.items():
        if given[name].shape != parameter.shape:
            message = (
                f"tensor {name} of the adapter in {adapter.path} has shape {given[name].shape}, "
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
