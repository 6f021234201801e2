"""Loading this rank's shard: everything is checked before a tensor is read, and read layer by layer.

mlx-lm's own sharded loading accepts missing files and leaves random weights in their place. Here every parameter of
the shard must be there with the right shape, or the load fails and names it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import _get_classes, dequantize_model, load_model

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import Span
from mlx_operator_api.tasks import Sharding
from mlx_runner.channel import LayerLoaded, Load, Loaded

from . import adapters, anatomy, imports, memory, pipeline, positions, prefix_cache, weights
from .architectures import architecture
from .failures import EngineError

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
"""The first number in the name of a tensor."""


@dataclass(frozen=True, slots=True)
class Shard:
    """What a rank holds. `model` is mlx-lm's; of a pipeline's it runs only the `stage`."""

    model: Any
    config: dict[str, Any]
    span: Span
    loaded: Loaded
    budget: memory.Budget
    prompt_cache_bytes: int
    ends_suffice: bool
    """See `anatomy.ends_suffice`."""
    stage: pipeline.Stage | None = None

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        return positions.of(self.config)


@dataclass(slots=True)
class _Draft:
    """What is found out while mlx-lm builds the model, before a tensor is read."""

    command: Load
    files: weights.Files
    spans: tuple[Span, ...] = ()
    found: anatomy.Anatomy | None = None
    given: dict[str, Any] = field(default_factory=dict)
    ends_suffice: bool = False
    bytes_of: tuple[int, ...] = ()
    """Weights of every rank of a pipeline, as stored."""

    @property
    def pipelined(self) -> bool:
        return self.command.world_size > 1 and self.command.sharding is Sharding.PIPELINE

    @property
    def span(self) -> Span:
        """The layers of this rank."""
        return self.spans[self.command.rank if self.pipelined else 0]


def load(command: Load, group: Any, tell: Callable[[LayerLoaded], None]) -> Shard:
    """Load the shard of a rank. `group`: MLX's, with Tensor and more than one rank.

    Raises:
        EngineError: the model is missing, damaged, unsupported, or does not fit.
    """
    draft = _Draft(command, weights.inspect(Path(command.path)))
    adapter = adapters.inspect(Path(command.adapter)) if command.adapter is not None else None
    model, config = _read_lazily(draft)
    largest = max((array.nbytes for array in draft.given.values()), default=0)
    notes = [_convert(model)]
    if adapter is not None:
        adapters.apply(model, anatomy.layers_of(model), draft.span, adapter)
        notes.append(f"{adapter.kind} adapter of rank {adapter.parameters['rank']} fused into the weights")
    if group is not None:
        _shard(model, group)
    positions.bound(model)
    stage = pipeline.Stage(model, draft.found, draft.span) if draft.pipelined and draft.found else None
    reuse = prefix_cache.budget(command.prompt_cache_bytes, _limits(command))
    budget = _budget(model, config, draft, largest, reuse)
    if budget.tokens is not None and command.rank == 0:
        notes.append(f"memory for {budget.tokens} tokens in work at once, {budget.context} in one request")
    if budget.rows < command.max_concurrent_requests:
        notes.append(f"{architecture(type(model))} computes one request at a time")
    layers = anatomy.layers_of(model)[draft.span.start : draft.span.end]
    _materialize(model, layers, draft, tell)
    loaded = Loaded(
        layers=str(draft.span),
        layers_total=len(layers),
        bytes=_bytes(model),
        note="; ".join(note for note in notes if note) or None,
    )
    return Shard(model, config, draft.span, loaded, budget, reuse, draft.ends_suffice, stage)


def _limits(command: Load) -> Sequence[int | None]:
    """Memory limits of all ranks, by rank."""
    return command.memory_limits or (command.memory_limit_bytes,) * command.world_size


def _bytes(module: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def _read_lazily(draft: _Draft) -> tuple[Any, dict[str, Any]]:
    """The model with lazy arrays for weights: headers are read, data is not."""
    if "model_file" in draft.files.config:
        raise EngineError(Reason.MODEL_UNSUPPORTED, "the model brings its own code (model_file), which is never run")

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, arguments = _classes(config)
        return _strict(model_class, draft), arguments

    try:
        model, config = load_model(draft.files.path, lazy=True, get_model_classes=classes)
    except TypeError as error:
        # ModelArgs without a default: the configuration lacks a field.
        raise EngineError(Reason.MODEL_CORRUPT, f"config.json does not fit its model_type: {error}") from error
    except KeyError as error:
        raise EngineError(Reason.MODEL_CORRUPT, f"the model's files lack {error}") from error
    except ValueError as error:
        # The kinds of quantization that mlx-lm refuses.
        raise EngineError(Reason.MODEL_UNSUPPORTED, str(error).split("\n")[0]) from error
    _check_taken(model, draft)
    return model, config


def _check_taken(model: Any, draft: _Draft) -> None:
    """Every parameter is an array of the files: nothing is left as the model's constructor made it up."""
    taken = {id(array) for array in draft.given.values()}
    left = [name for name, array in tree_flatten(model.parameters()) if id(array) not in taken]
    if left:
        raise EngineError(
            Reason.LOAD_FAILED, f"{len(left)} parameters were not loaded from the files, such as {left[0]}"
        )


def _classes(config: dict[str, Any]) -> tuple[type, type]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise EngineError(Reason.MODEL_UNSUPPORTED, "config.json names no model_type")
    try:
        return _get_classes(config)
    except ValueError as error:
        message = f"model_type {model_type!r} is not known to mlx-lm, see its list of supported models"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message) from error


def _strict(model_class: type, draft: _Draft) -> type:
    """The model's class with a `load_weights` that cuts the model first and then takes exactly what is left of it."""

    def sanitize(self: Any, given: dict[str, Any]) -> dict[str, Any]:
        _plan(self, draft)
        whole = {**given, **_stand_ins(draft, given)}
        own: Any = getattr(model_class, "sanitize", None)
        return whole if own is None else dict(own(self, whole))

    def load_weights(self: Any, given: list[tuple[str, Any]], strict: bool = True) -> Any:
        draft.ends_suffice = anatomy.ends_suffice(self)
        if draft.pipelined:
            draft.found = pipeline.check(self, draft.spans)
            draft.bytes_of = tuple(_bytes_of(self, draft.found, part) for part in draft.spans)
            pipeline.cut(self, draft.found, draft.span)
        needed = dict(tree_flatten(self.parameters()))
        _compare(draft.files, needed, dict(given), whole=not draft.pipelined)
        draft.given = {name: array for name, array in given if name in needed}
        return nn.Module.load_weights(self, list(draft.given.items()), strict=False)

    methods = {"sanitize": sanitize, "load_weights": load_weights, "__module__": __name__}
    return type(model_class.__name__, (model_class,), methods)


def _plan(model: Any, draft: _Draft) -> None:
    try:
        total = len(anatomy.layers_of(model))
    except anatomy.UnsuitableError as error:
        name = architecture(type(model))
        raise EngineError(Reason.MODEL_UNSUPPORTED, f"architecture {name} cannot be served: {error}") from error
    command = draft.command
    draft.spans = (Span(0, total, total),)
    if draft.pipelined:
        draft.spans = pipeline.spans(total, command.world_size, command.memory_limits)


def _stand_ins(draft: _Draft, given: dict[str, Any]) -> dict[str, Any]:
    """Arrays for tensors of other ranks' layers whose files are not here.

    Models rename and stack what the files hold, and judge by a layer of their choice which form that is in: without
    the others' layers they would take ours for another form. Nothing of these arrays is ever used.
    """
    shapes = {_LAYER_NUMBER.sub(".#.", name, count=1): array for name, array in given.items()}
    found = {}
    for name in draft.files.expected.keys() - given.keys():
        number = _LAYER_NUMBER.search(name)
        like = shapes.get(_LAYER_NUMBER.sub(".#.", name, count=1))
        if number and like is not None and not draft.span.start <= int(number[1]) < draft.span.end:
            found[name] = mx.zeros(like.shape, like.dtype)
    return found


def _bytes_of(model: Any, found: anatomy.Anatomy, part: Span) -> int:
    outside = anatomy.outside(model, found.layers)
    arrays = [(module, key, value) for module in outside for key, value in module.items()]
    shared = sum(a.nbytes for m, k, a in arrays if isinstance(a, mx.array) and found.needs(m, k, part))
    return shared + sum(_bytes(layer) for layer in found.layers[part.start : part.end])


def _compare(files: weights.Files, needed: dict[str, Any], given: dict[str, Any], *, whole: bool) -> None:
    absent = [name for name in needed if name not in given]
    if absent:
        raise weights.missing(files, absent)
    for name, parameter in needed.items():
        file = files.expected.get(name, "the safetensors files")
        array = given[name]
        if parameter.shape != array.shape:
            message = f"tensor {name} in {file} has shape {array.shape}, config.json asks for {parameter.shape}"
            raise EngineError(Reason.MODEL_CORRUPT, message)
        if _kind(parameter) != _kind(array):
            message = f"tensor {name} in {file} is of type {_name(array)}, the model computes with {_kind(parameter)}"
            raise EngineError(Reason.MODEL_CORRUPT, message)
    extra = [name for name in given if name not in needed] if whole else []
    if extra:
        message = f"the files hold {len(extra)} tensors that config.json knows nothing of, such as {extra[0]}"
        raise EngineError(Reason.MODEL_CORRUPT, message)


def _name(array: Any) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _kind(array: Any) -> str:
    """What may stand for what: any float for a float, packed integers only for themselves."""
    return "floats" if mx.issubdtype(array.dtype, mx.floating) else _name(array)


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
            kinds.add(_name(array))
    if not kinds:
        return None
    model.update(tree_map(_float32, model.parameters()))
    return f"cast from {' and '.join(sorted(kinds))} to float32 on CPU"


def _float32(array: Any) -> Any:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _shard(model: Any, group: Any) -> None:
    """Split the layers over the ranks of MLX's group."""
    name = architecture(type(model))
    if not hasattr(model, "shard"):
        message = (
            f"architecture {name} cannot be split by tensors: mlx-lm has no shard() for it; use Pipeline or one runner"
        )
        raise EngineError(Reason.MODEL_UNSUPPORTED, message)
    arguments, ranks = getattr(model, "args", None), group.size()
    for number in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(arguments, number, None)
        if isinstance(heads, int) and heads % ranks:
            message = f"{number} {heads} is not divisible by {ranks} ranks: use another number of runners, or Pipeline"
            raise EngineError(Reason.MODEL_UNSUPPORTED, message)
    try:
        model.shard(group)
    except (ValueError, AssertionError) as error:
        message = f"{name} cannot be split by tensors over {ranks} ranks: {error}"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message) from error


def _budget(model: Any, config: dict[str, Any], draft: _Draft, largest: int, reuse: int) -> memory.Budget:
    """What is left for requests.

    Raises:
        EngineError: too little, with the sum.
    """
    command, own = draft.command, _bytes(model)
    if draft.found is not None:
        # Before it is read a model's arrays are float32; on a GPU they keep the type of the files.
        width = _width(model)
        together = draft.found.together
        caches = [pipeline.cache_sizes(draft.found, part, width) for part in draft.spans]
        scale = own / max(1, draft.bytes_of[command.rank])
        sizes = [int(size * scale) for size in draft.bytes_of]
    else:
        measured, together = pipeline.measure(model)
        caches = [measured] * command.world_size
        sizes = [own] * command.world_size
    ranks = [memory.Rank(*facts) for facts in zip(sizes, [largest] * len(sizes), caches, _limits(command), strict=True)]
    this = memory.Rank(own, largest, caches[command.rank], command.memory_limit_bytes)
    rows = command.max_concurrent_requests if together else 1
    wish = memory.Wish(command.context_length, rows, positions.of(config))
    sums = memory.Sum(memory.Shape.of(config), memory.resident_bytes() + command.spare_bytes, reuse)
    return sums.budget(this, [rank for number, rank in enumerate(ranks) if number != command.rank], wish)


def _width(model: Any) -> int:
    """Bytes of one number that is computed with."""
    widths = [a.itemsize for _, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)]
    return max(widths, default=4)


def _materialize(model: Any, layers: Sequence[Any], draft: _Draft, tell: Callable[[LayerLoaded], None]) -> None:
    """Read the data, layer by layer."""
    where = f"the weights of {{}} cannot be read from {draft.files.path}: a file changed or its volume fails"
    try:
        for number, layer in enumerate(layers, start=1):
            what = f"layer {draft.span.start + number - 1}"
            mx.eval(layer.parameters())
            tell(LayerLoaded(loaded=number, total=len(layers), layers=str(draft.span)))
        what = "embedding, norm and head"
        mx.eval(model.parameters())
    except RuntimeError as error:
        if "[read]" not in str(error):
            raise
        message = f"{where.format(what)} ({str(error).splitlines()[0]})"
        raise EngineError(Reason.MODEL_CORRUPT, message) from error
