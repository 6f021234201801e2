"""What a model is made of, found by a rehearsal of its forward pass: layers, embedding, what comes before and after.

No list of names: whatever the model's code does around its layers (scaled embeddings, soft caps, a mask for each kind
of layer) stays the model's own code. The rehearsal runs that code once as a whole and once cut into the stages asked
for, with a cheap stand-in for the arithmetic of each layer that takes in all the layer is given; both must come to
the same result, so nothing but hidden states may pass from one stage to the next. Weights are never computed: it
costs milliseconds for a model of any size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from mlx_operator_api.layers import Span

from .architectures import STATES, architecture
from .blocks import BLOCK
from .caches import CachePlan, CacheSize, merge, size, window

_BIG_BYTES = 1 << 20
"""Modules outside the layers with more weights than this are not computed in a rehearsal."""
_LENGTHS = (3, 2, 1, 3, 2, 1, 3, 2, 1, 3, 2)
"""Of the prompts of a rehearsal: different, so that padding takes part; more than a mask could mistake for heads."""
BEFORE, INSIDE, AFTER = "before", "inside", "after"


class UnsuitableError(Exception):
    """Why this model's forward pass cannot be cut."""


class ReachedError(Exception):
    """The forward pass came to the end of a stage; not an error, but the way out of the model's code."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden


@dataclass(slots=True)
class Anatomy:
    """Where things are in one model."""

    layers: list[Any]
    """The model's own list of its decoder layers, all of them."""
    embedding: str = ""
    """Path of the module that turns token ids into vectors."""
    uses: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    """By id of a module outside the layers and name of its array: when it is used."""
    cache_of: list[int | None] = field(default_factory=list)
    """Which of the model's caches each layer uses."""
    caches: list[CacheSize] = field(default_factory=list)
    """What each of the model's caches takes, in float32."""
    together: bool = True
    """Whether several requests can be computed at once."""

    def needs(self, module: Any, key: str, part: Span) -> bool:
        """Whether a stage uses this array of a module outside the layers."""
        uses = self.uses.get((id(module), key), {INSIDE})
        return INSIDE in uses or (part.first and BEFORE in uses) or (part.last and AFTER in uses)


def layers_of(model: Any) -> list[Any]:
    """The list in which a model keeps its decoder layers.

    Raises:
        UnsuitableError: there is none.
    """
    wanted = list(getattr(model, "layers", ()))
    for module in model.modules():
        for value in module.values():
            same = isinstance(value, list) and len(value) == len(wanted) > 0
            if same and all(a is b for a, b in zip(value, wanted, strict=True)):
                return list(value)
    raise UnsuitableError("it has no list of decoder layers")


def outside(model: Any, layers: Sequence[Any]) -> list[Any]:
    """Modules that hold arrays of their own and belong to no layer."""
    inner = {id(module) for layer in layers for module in layer.modules()}
    return [module for module in model.modules() if id(module) not in inner and _own_arrays(module)]


def _own_arrays(module: Any) -> list[str]:
    return [key for key, value in module.items() if isinstance(value, mx.array)]


def swap(module: Any, **methods: Callable[..., Any]) -> None:
    """Give one module other methods: Python looks special ones up on the class."""
    module.__class__ = type(type(module).__name__, (type(module),), {**methods, "__module__": __name__})


def examine(model: Any, parts: Sequence[Span]) -> Anatomy:
    """Rehearse a model whose weights are not read yet, as a whole and in the stages `parts` (by rank).

    Raises:
        UnsuitableError: it cannot be cut there, or a cache not hold several requests.
    """
    caches, together = measure(model)
    anatomy = Anatomy(layers_of(model), caches=caches, together=together)
    rehearsal = _Rehearsal(model, anatomy)
    with rehearsal.prepared(), _explained():
        whole = rehearsal.whole()
        staged = rehearsal.staged(parts)
    if not all(mx.array_equal(a, b).item() for a, b in zip(whole, staged, strict=True)):
        raise UnsuitableError("more than hidden states passes between its layers")
    return anatomy


def measure(model: Any) -> tuple[list[CacheSize], bool]:
    """What a model's caches take, and whether several requests can be computed at once; nothing is computed.

    The sizes follow from the shapes of what the layers put into the caches.

    Raises:
        UnsuitableError: a cache cannot hold several requests, or the model's code fails.
    """
    single = sorted({type(cache).__name__ for cache in make_prompt_cache(model) if not hasattr(cache, "merge")})
    if single:
        raise UnsuitableError(f"it keeps its state in a {', '.join(single)}, which cannot hold several requests")
    with _explained():
        short, long = _allocated(model, BLOCK), _allocated(model, 2 * BLOCK)
    sizes = []
    for cache, low, high in zip(make_prompt_cache(model), short, long, strict=True):
        position = max(0, high - low) // BLOCK
        sizes.append(CacheSize(position, max(0, low - position * BLOCK), window(cache)))
    return sizes, _together(model)


def ends_suffice(model: Any) -> bool:
    """Whether what follows the layers computes every position by itself, so that it need see only the last of a row."""
    try:
        rehearsal = _Rehearsal(model, Anatomy(layers_of(model), together=_together(model)))
        with rehearsal.prepared(), _explained():
            whole, cut = rehearsal.whole()[0], rehearsal.whole(cut=True)[0]
            return bool(mx.allclose(ends(whole, rehearsal.lengths), cut, rtol=1e-4).item())
    except UnsuitableError:
        return False


def ends(hidden: Any, lengths: Sequence[int]) -> Any:
    """Of hidden states (rows, positions, size): after the first `lengths` positions of each row, (rows, 1, size)."""
    return hidden[mx.arange(len(lengths)), mx.array(list(lengths), dtype=mx.int32) - 1][:, None]


def _together(model: Any) -> bool:
    """Some models' masks only fit one row, and some states take in the padding beside a shorter prompt."""
    if any(_has_state(cache) for cache in make_prompt_cache(model)) and architecture(type(model)) not in STATES:
        return False
    try:
        with _explained():
            _rehearse_rows(model, _LENGTHS)
    except UnsuitableError:
        with _explained():
            _rehearse_rows(model, _LENGTHS[:1])
        return False
    return True


def _has_state(cache: Any) -> bool:
    return isinstance(cache, ArraysCache) or any(_has_state(part) for part in getattr(cache, "caches", ()))


def _rehearse_rows(model: Any, lengths: Sequence[int]) -> None:
    caches = merge([make_prompt_cache(model) for _ in lengths])
    _play(lambda tokens: model(tokens, cache=caches), caches, lengths)


def _allocated(model: Any, positions: int) -> list[int]:
    caches = make_prompt_cache(model)
    model(mx.zeros((1, positions), dtype=mx.int32), cache=caches)
    return [size(cache) for cache in caches]


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever a model's own code stumbles over tells why it does not suit."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, AssertionError) as error:
        text = str(error).splitlines()
        raise UnsuitableError(f"{type(error).__name__}: {text[0] if text else ''}") from error


def _play(run: Callable[[Any], Any], caches: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
    """Outputs, not computed yet, of a batch of prompts and of one step after them."""
    rows, longest = len(lengths), max(lengths)
    if rows > 1:
        for cache in caches:
            cache.prepare(lengths=list(lengths), right_padding=[longest - length for length in lengths])
    outputs = [run(mx.arange(rows * longest).reshape(rows, longest))]
    if rows > 1:
        for cache in caches:
            cache.finalize()
    return [*outputs, run(mx.arange(1, rows + 1)[:, None])]


class _Rehearsal:
    """Runs a model with stand-ins for its layers; `_part` is the stage being played, None for the whole."""

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self._model = model
        self._anatomy = anatomy
        self._part: Span | None = None
        self._hidden: Any = None
        self._phase = BEFORE
        self._caches: list[Any] = []
        self._embedding: Any = None
        self._cut = False
        self.lengths = _LENGTHS if anatomy.together else _LENGTHS[:1]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model's modules play along in the body of this context."""
        original = [(module, type(module)) for module in self._model.modules()]
        for index, layer in enumerate(self._anatomy.layers):
            swap(layer, __call__=self._layer(index, type(layer)))
        for module in outside(self._model, self._anatomy.layers):
            self._watch(module)
        try:
            yield
        finally:
            for module, kind in original:
                module.__class__ = kind

    def whole(self, *, cut: bool = False) -> list[Any]:
        """Outputs of the model as it is; `cut`: what follows the layers gets only the ends of the prompts."""
        self._cut = cut
        self._anatomy.cache_of = [None] * len(self._anatomy.layers)
        self._caches = merge([make_prompt_cache(self._model) for _ in self.lengths])

        def run(tokens: Any) -> Any:
            self._phase = BEFORE
            return self._model(tokens, cache=self._caches)

        return _play(run, self._caches, self.lengths)

    def staged(self, parts: Sequence[Span]) -> list[Any]:
        """The same, stage by stage."""
        if self._embedding is None:
            raise UnsuitableError("it has no single module that embeds tokens")
        plans = [CachePlan(make_prompt_cache(self._model), self._anatomy.cache_of, part) for part in parts]
        caches = [merge([plan.take(make_prompt_cache(self._model)) for _ in self.lengths]) for plan in plans]

        def run(tokens: Any) -> Any:
            self._part, self._phase = None, BEFORE
            hidden = self._embedding(tokens)
            for part, plan, cache in reversed(list(zip(parts, plans, caches, strict=True))):
                self._part, self._hidden, self._caches = part, hidden, plan.spread(cache)
                try:
                    hidden = self._model(mx.zeros_like(tokens), cache=self._caches)
                except ReachedError as reached:
                    hidden = reached.hidden
                plan.advance(cache, *tokens.shape)
            return hidden

        return _play(run, [layer for cache in caches for layer in cache], self.lengths)

    def _layer(self, index: int, kind: type) -> Callable[..., Any]:
        original: Any = kind.__call__

        def stand_in(layer: Any, hidden: Any, *args: Any, **options: Any) -> Any:
            part = self._part
            if part is not None and index >= part.end:
                raise ReachedError(hidden)
            if part is not None and index < part.start:
                return copied(self._hidden) if index == part.start - 1 else hidden
            self._note_cache(index, (*args, *options.values()))
            digest = _digest((args, options))
            self._phase = INSIDE
            real = original(layer, hidden, *args, **options)
            last = index == len(self._anatomy.layers) - 1
            self._phase = AFTER if last else INSIDE
            if not isinstance(real, mx.array) or real.shape != hidden.shape:
                raise UnsuitableError("its layers return more than hidden states")
            given = hidden * (1.0 + 0.01 * (index + 1)) + digest
            return ends(given, self.lengths) if self._cut and last and hidden.shape[1] > 1 else given

        return stand_in

    def _note_cache(self, index: int, given: Sequence[Any]) -> None:
        if self._part is None and self._anatomy.cache_of:
            found = [number for number, cache in enumerate(self._caches) if any(cache is value for value in given)]
            self._anatomy.cache_of[index] = found[0] if found else None

    def _watch(self, module: Any) -> None:
        kind: Any = type(module)
        big = sum(module[key].nbytes for key in _own_arrays(module)) > _BIG_BYTES

        def use(key: str, value: Any) -> Any:
            if isinstance(value, mx.array):
                if self._part is not None and not self._anatomy.needs(module, key, self._part):
                    raise UnsuitableError(f"its forward pass reads {key} of a {kind.__name__} in every stage")
                if self._part is None:
                    self._anatomy.uses.setdefault((id(module), key), set()).add(self._phase)
            return value

        def called(method: Any, *, direct: bool) -> Callable[..., Any]:
            def call(_: Any, *args: Any, **options: Any) -> Any:
                tokens = args[0] if args and isinstance(args[0], mx.array) else None
                embeds = tokens is not None and tokens.ndim == 2 and not mx.issubdtype(tokens.dtype, mx.floating)
                if direct and self._part is not None and (module is self._embedding or self._absent(module)):
                    return copied(self._hidden)
                real = method(module, *args, **options)
                if embeds and self._phase == BEFORE and isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
                    if self._embedding is None:
                        self._embedding = module
                        self._anatomy.embedding = next(n for n, m in self._model.named_modules() if m is module)
                    if module is self._embedding:
                        return _embedded(tokens, real)
                return _projected(tokens, real) if big and tokens is not None else real

            return call

        methods = {
            "__getattr__": lambda self_, key: use(key, kind.__getattr__(self_, key)),
            "__getitem__": lambda self_, key: use(key, dict.__getitem__(self_, key)),
        }
        for name in ("__call__", "as_linear"):
            if hasattr(kind, name):
                methods[name] = called(getattr(kind, name), direct=name == "__call__")
        swap(module, **methods)

    def _absent(self, module: Any) -> bool:
        """Whether a stage holds nothing of a module."""
        part = self._part
        return part is not None and not any(self._anatomy.needs(module, key, part) for key in _own_arrays(module))


def copied(hidden: Any) -> Any:
    """The same values in an object of its own: `h *= scale` in a model's code changes the object that it was given."""
    return mx.stop_gradient(hidden)


def _embedded(tokens: Any, real: Any) -> Any:
    """Vectors that differ by token and place, without the embedding's weights."""
    return mx.sin((tokens[..., None] + 1) * mx.arange(1, real.shape[-1] + 1)).astype(real.dtype)


def _projected(hidden: Any, real: Any) -> Any:
    """Something of the shape of a projection that follows from its input, without the projection's weights."""
    weights = mx.sin(mx.arange(hidden.shape[-1]))
    return mx.broadcast_to((hidden * weights).sum(-1, keepdims=True), real.shape).astype(real.dtype)


def _digest(value: Any) -> Any:
    """A number for all that a layer is given beside hidden states."""
    if isinstance(value, mx.array):
        flat = mx.clip(value.astype(mx.float32).reshape(-1), -1.0, 1.0)
        return 0.1 * (flat * mx.sin(mx.arange(1, flat.size + 1))).sum()
    if isinstance(value, str):
        return 0.001 * sum(value.encode())
    if isinstance(value, bool | int | float):
        return 0.1 * float(value)
    if isinstance(value, dict):
        return sum((_digest(item) for item in value.values()), start=0.0)
    if isinstance(value, list | tuple):
        return sum(((1 + 0.1 * place) * _digest(item) for place, item in enumerate(value)), start=0.0)
    return _digest(getattr(value, "offset", 0.0)) if value is not None else 0.0
