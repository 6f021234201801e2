"""Stages of a pipeline: some whole layers of a model, run by the model's own forward pass.

Rank n-1 holds the first layers and the embedding, rank 0 the last ones with norm and head; a rank between holds
neither. mlx-lm's own pipelines exist for few architectures, keep everything on every rank and end each step in a
collective. Here the model's code runs on every rank, but is entered and left between two layers: in front of a
stage's first layer what came from the rank above takes the place of all that was computed so far, and at its last
one the code is left. `anatomy.examine` has made sure beforehand that this gives what the whole would.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import Span, TooFewLayersError, split

from . import anatomy
from .anatomy import Anatomy, ReachedError, UnsuitableError, copied, examine, outside, swap
from .architectures import PIPELINE, architecture
from .caches import CachePlan, CacheSize
from .failures import EngineError


def spans(total: int, world_size: int, memory_limits: Sequence[int | None] = ()) -> tuple[Span, ...]:
    """The layers of all ranks, by rank.

    Raises:
        EngineError: fewer layers than ranks.
    """
    try:
        return split(total, world_size, memory_limits)
    except TooFewLayersError as error:
        raise EngineError(Reason.MODEL_UNSUPPORTED, str(error)) from error


def largest(total: int, world_size: int, memory_limits: Sequence[int | None] = ()) -> int:
    """The most layers that any rank has; see `spans`."""
    return max(part.end - part.start for part in split(total, world_size, memory_limits))


def check(model: Any, parts: Sequence[Span]) -> Anatomy:
    """Rehearse a model that was not read yet in these stages, by rank.

    Raises:
        EngineError: it cannot be cut there, or not compute several requests at once.
    """
    name = architecture(type(model))
    try:
        return examine(model, parts)
    except UnsuitableError as error:
        message = (
            f"architecture {name} cannot be split into a pipeline: {error}; "
            f"use one runner; tested in a pipeline: {', '.join(PIPELINE)}"
        )
        raise EngineError(Reason.MODEL_UNSUPPORTED, message) from error


def cache_sizes(found: Anatomy, part: Span, width: int) -> tuple[CacheSize, ...]:
    """What the caches of a stage take, with numbers of `width` bytes."""
    held = sorted({cache for cache in found.cache_of[part.start : part.end] if cache is not None})
    return tuple(_scaled(found.caches[index], width) for index in held)


def _scaled(cache: CacheSize, width: int) -> CacheSize:
    return replace(cache, position=cache.position * width // 4, fixed=cache.fixed * width // 4)


def measure(model: Any) -> tuple[tuple[CacheSize, ...], bool]:
    """What the caches of a whole model (or of a tensor group's part) take, and whether it computes several requests.

    Raises:
        EngineError: a cache cannot hold several requests, or the model's code fails.
    """
    try:
        sizes, together = anatomy.measure(model)
    except UnsuitableError as error:
        message = f"architecture {architecture(type(model))} cannot be served: {error}"
        raise EngineError(Reason.MODEL_UNSUPPORTED, message) from error
    return tuple(sizes), together


class Absent(nn.Module):
    """What is left of a module whose arrays another rank holds: its attributes."""


def cut(model: Any, found: Anatomy, part: Span) -> None:
    """Leave only this stage's arrays in a model that was not read yet; layers keep their numbers."""
    for index, layer in enumerate(found.layers):
        if not part.start <= index < part.end:
            for module in layer.modules():
                # A model's code may ask a layer what kind it is: only its parts lose their class.
                _strip(module, lambda key: False, whole=module is not layer)
    for module in outside(model, found.layers):
        _strip(module, partial(found.needs, module, part=part))


def _strip(module: Any, keeps: Callable[[str], bool], *, whole: bool = True) -> None:
    own = [key for key, value in module.items() if isinstance(value, mx.array)]
    kept = [key for key in own if keeps(key)]
    for key in own:
        if key not in kept:
            del module[key]
    if whole and own and not kept:
        module.__class__ = Absent


class Stage:
    """One rank's part of the forward pass of a model that was cut and read."""

    def __init__(self, model: Any, found: Anatomy, part: Span) -> None:
        self.span = part
        self._model = model
        self._hidden: Any = None
        self._plan = CachePlan(make_prompt_cache(model), found.cache_of, part)
        embedding: Any = dict(model.named_modules())[found.embedding]
        self._embed = type(embedding).__call__.__get__(embedding) if part.first else None

        def given(*_: Any, **__: Any) -> Any:
            return copied(self._hidden)

        inner = [module for layer in found.layers for module in layer.modules()]
        for module in model.modules():
            if module is embedding or (isinstance(module, Absent) and not any(module is m for m in inner)):
                swap(module, __call__=given)
        for index, layer in enumerate(found.layers):
            if index < part.start:
                swap(layer, __call__=given if index == part.start - 1 else _passed)
            elif index >= part.end:
                swap(layer, __call__=_reached)

    def make_cache(self) -> list[Any]:
        """Caches of the layers here (and what stands for the others), for one sequence."""
        return self._plan.take(make_prompt_cache(self._model))

    def embed(self, tokens: Any) -> Any:
        """Vectors (rows, positions, hidden) of token ids (rows, positions); first stage only."""
        assert self._embed is not None  # noqa: S101 (narrowing)
        return self._embed(tokens)

    def run(self, hidden: Any, cache: list[Any]) -> Any:
        """Hidden states after the layers here; on the last stage the logits, (rows, positions, vocabulary).

        `hidden`: what `embed` gave, or the stage above.
        """
        self._hidden = hidden
        rows, positions = hidden.shape[:2]
        try:
            result = self._model(mx.zeros((rows, positions), dtype=mx.int32), cache=self._plan.spread(cache))
        except ReachedError as reached:
            result = reached.hidden
        finally:
            self._hidden = None
        self._plan.advance(cache, rows, positions)
        return result

    def logits(self, result: Any) -> Any:
        """Logits (rows, vocabulary) of the last position of what `run` gave; last stage only."""
        return result[:, -1]


def _passed(_: Any, hidden: Any, *__: Any, **___: Any) -> Any:
    return hidden


def _reached(_: Any, hidden: Any, *__: Any, **___: Any) -> Any:
    raise ReachedError(hidden)
