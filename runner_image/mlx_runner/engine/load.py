"""Loading this rank's shard: everything is checked before a tensor is read, and read layer by layer.

mlx-lm's own sharded loading accepts missing files and leaves random weights in their place. Here every parameter of
the shard must be there with the right shape, or the load fails and names it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, dequantize_model, load_model

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import Span
from mlx_operator_api.tasks import Sharding
from mlx_runner.channel import LayerLoaded, Load, Loaded

from . import imports, pipeline, weights
from .failures import EngineError

_DEFAULT_CONTEXT = 4096
"""For a model whose configuration names no limit."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds. `model` is mlx-lm's, cut or sharded."""

    model: Any
    config: dict[str, Any]
    span: Span
    loaded: Loaded

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        for config in (self.config, self.config.get("text_config") or {}):
            if isinstance(limit := config.get("max_position_embeddings"), int):
                return limit
        return _DEFAULT_CONTEXT


def load(command: Load, group: Any, tell: Callable[[LayerLoaded], None]) -> Shard:
    """Load the shard of a rank. `group`: MLX's, with Tensor and more than one rank.

    Raises:
        EngineError: the model is missing, damaged, unsupported, or does not fit.
    """
    files = weights.inspect(Path(command.path))
    pipelined = command.world_size > 1 and command.sharding is Sharding.PIPELINE
    model, config, span = _read_lazily(files, command, pipelined=pipelined)
    if not pipelined:
        _check_caches(model)  # a pipeline has checked its own
    note = _convert(model)
    if group is not None:
        _shard(model, group)
    _check_memory(model, command.memory_limit_bytes, command.spare_bytes)
    _materialize(model, span, tell)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return Shard(model, config, span, Loaded(layers=str(span), layers_total=len(_own(model)), bytes=size, note=note))


def _read_lazily(files: weights.Files, command: Load, *, pipelined: bool) -> tuple[Any, dict[str, Any], Span]:
    """The model with lazy arrays for weights: headers are read, data is not."""
    if "model_file" in files.config:
        raise EngineError(Reason.MODEL_UNSUPPORTED, "the model brings its own code (model_file), which is never run")
    spans: list[Span] = []

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments = _classes(config)
        return _strict(model_class, files, command, spans, pipelined=pipelined), arguments

    try:
        model, config = load_model(files.path, lazy=True, get_model_classes=classes)
    except TypeError as error:
        # ModelArgs without a default: the configuration lacks a field.
        raise EngineError(Reason.MODEL_CORRUPT, f"config.json does not fit its model_type: {error}") from error
    except KeyError as error:
        raise EngineError(Reason.MODEL_CORRUPT, f"the model's files lack {error}") from error
    except ValueError as error:
        # The kinds of quantization that mlx-lm refuses.
        raise EngineError(Reason.MODEL_UNSUPPORTED, str(error).split("\n")[0]) from error
    return model, config, spans[0]


def _classes(config: dict[str, Any]) -> tuple[type, type]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise EngineError(Reason.MODEL_UNSUPPORTED, "config.json names no model_type")
    try:
        return _get_classes(config)
    except ValueError as error:
        message = f"model_type {model_type!r} is not known to mlx-lm, see its list of supported models"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message) from error


def _strict(model_class: type, files: weights.Files, command: Load, spans: list[Span], *, pipelined: bool) -> type:
    """The model's class with a `load_weights` that cuts the model first and then takes exactly what is left of it."""

    def load_weights(self: Any, given: list[tuple[str, Any]], strict: bool = True) -> Any:
        total = len(_own(self))
        if pipelined:
            pipeline.check(self)
            spans.append(pipeline.span(total, command.rank, command.world_size))
            pipeline.cut(self, spans[0])
        else:
            spans.append(Span(0, total, total))
        needed = dict(tree_flatten(self.parameters()))
        _compare(files, needed, dict(given), whole=not pipelined)
        return nn.Module.load_weights(self, [(k, v) for k, v in given if k in needed], strict=False)

    return type(model_class.__name__, (model_class,), {"load_weights": load_weights, "__module__": __name__})


def _own(model: Any) -> list[Any]:
    """The decoder layers that a model (or what is left of it) holds."""
    return [layer for layer in getattr(getattr(model, "model", None), "layers", model.layers) if layer is not None]


def _compare(files: weights.Files, needed: dict[str, Any], given: dict[str, Any], *, whole: bool) -> None:
    absent = [name for name in needed if name not in given]
    if absent:
        raise weights.missing(files, absent)
    for name, parameter in needed.items():
        if parameter.shape != given[name].shape:
            file = files.expected.get(name, "the safetensors files")
            message = f"tensor {name} in {file} has shape {given[name].shape}, config.json asks for {parameter.shape}"
            raise EngineError(Reason.MODEL_CORRUPT, message)
    extra = [name for name in given if name not in needed] if whole else []
    if extra:
        message = f"the files hold {len(extra)} tensors that config.json knows nothing of, such as {extra[0]}"
        raise EngineError(Reason.MODEL_CORRUPT, message)


def _check_caches(model: Any) -> None:
    """Requests are computed together, so the caches of several must become one."""
    single = {type(cache).__name__ for cache in make_prompt_cache(model) if not hasattr(cache, "merge")}
    if single:
        name = pipeline.architecture(type(model))
        message = f"{name} keeps its state in a {', '.join(sorted(single))}, which cannot hold several requests"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message)


def _convert(model: Any) -> str | None:
    """On CPU only float32 is fast (BLAS); lazily cast everything else to it, and say so."""
    if imports.device() != "cpu":
        return None
    kinds = set()
    if any(hasattr(module, "scales") for _, module in model.named_modules()):
        kinds.add("quantized")
        dequantize_model(model)
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating) and array.dtype != mx.float32:
            kinds.add(str(array.dtype).removeprefix("mlx.core."))
    if not kinds:
        return None
    model.update(tree_map(_float32, model.parameters()))
    return f"cast from {' and '.join(sorted(kinds))} to float32 on CPU"


def _float32(array: Any) -> Any:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _shard(model: Any, group: Any) -> None:
    """Split the layers over the ranks of MLX's group."""
    name = pipeline.architecture(type(model))
    if not hasattr(model, "shard"):
        message = (
            f"architecture {name} cannot be split by tensors: mlx-lm has no shard() for it; use Pipeline or one runner"
        )
        raise EngineError(Reason.MODEL_UNSUPPORTED, message)
    arguments, ranks = getattr(model, "args", None), group.size()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(arguments, field, None)
        if isinstance(heads, int) and heads % ranks:
            message = f"{field} {heads} is not divisible by {ranks} ranks: use another number of runners, or Pipeline"
            raise EngineError(Reason.MODEL_UNSUPPORTED, message)
    try:
        model.shard(group)
    except (ValueError, AssertionError) as error:
        message = f"{name} cannot be split by tensors over {ranks} ranks: {error}"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message) from error


def _check_memory(model: Any, limit: int | None, spare: int) -> None:
    needed = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    resident = _resident_bytes()
    if limit is not None and needed + resident + spare > limit:
        beside = f", a spare engine {_mebibytes(spare)}" if spare else ""
        message = (
            f"the shard needs {_mebibytes(needed)} and the engine {_mebibytes(resident)}{beside}, "
            f"more than the memory limit of {_mebibytes(limit)}"
        )
        raise EngineError(Reason.INSUFFICIENT_MEMORY, message)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _mebibytes(size: int) -> str:
    return f"{size / 1024 / 1024:.0f} MiB"


def _materialize(model: Any, span: Span, tell: Callable[[LayerLoaded], None]) -> None:
    """Read the data, layer by layer."""
    layers = _own(model)
    for number, layer in enumerate(layers, start=1):
        mx.eval(layer.parameters())
        tell(LayerLoaded(loaded=number, total=len(layers), layers=str(span)))
    mx.eval(model.parameters())
