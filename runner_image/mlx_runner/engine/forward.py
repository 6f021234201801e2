"""Running the operations of a frame on this rank's part of the model.

`Executor` keeps the caches: one lane of rows that decode together, and the cache of a long prompt that is being
prefilled. What differs between ranks and shardings is behind `Compute`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from . import frames
from .hidden import HiddenIn, HiddenOut
from .pipeline import Stage


class Compute(Protocol):
    """This rank's part of one forward pass."""

    def make_cache(self) -> list[Any]:
        """Caches of the layers of this rank, for one sequence."""

    def prefill(self, tokens: Sequence[Sequence[int]], cache: list[Any]) -> None:
        """Fill the cache with token ids (rows, positions)."""

    def step(self, tokens: Sequence[int], cache: list[Any]) -> Any | None:
        """One token a row: logits (rows, vocabulary) on rank 0, None elsewhere."""


class WholeModel:
    """All layers are here: the only rank, or a rank of a tensor group (whose layers talk to each other)."""

    def __init__(self, model: Any, *, leader: bool) -> None:
        self._model = model
        self._leader = leader

    def make_cache(self) -> list[Any]:
        """See `Compute`."""
        return list(make_prompt_cache(self._model))

    def prefill(self, tokens: Sequence[Sequence[int]], cache: list[Any]) -> None:
        """See `Compute`."""
        self._model(_integers(tokens), cache=cache)
        mx.eval([layer.state for layer in cache])

    def step(self, tokens: Sequence[int], cache: list[Any]) -> Any | None:
        """See `Compute`."""
        logits = self._model(_integers(tokens)[:, None], cache=cache)
        # The head may be split too, so every rank evaluates it.
        mx.eval(logits)
        return logits[:, -1] if self._leader else None


class PipelineStage:
    """Some of the layers: hidden states come from the rank above and go to the rank below."""

    def __init__(self, stage: Stage, source: HiddenIn | None, sink: HiddenOut | None) -> None:
        self._stage = stage
        self._source = source
        self._sink = sink

    def make_cache(self) -> list[Any]:
        """See `Compute`."""
        return self._stage.make_cache()

    def prefill(self, tokens: Sequence[Sequence[int]], cache: list[Any]) -> None:
        """See `Compute`."""
        self._forward(tokens, cache)
        mx.eval([layer.state for layer in cache])

    def step(self, tokens: Sequence[int], cache: list[Any]) -> Any | None:
        """See `Compute`."""
        hidden = self._forward([[token] for token in tokens], cache)
        return None if hidden is None else self._stage.logits(hidden)

    def _forward(self, tokens: Sequence[Sequence[int]], cache: list[Any]) -> Any | None:
        if self._source is None:
            hidden = self._stage.embed(_integers(tokens))
        else:
            hidden = self._source.receive(len(tokens), len(tokens[0]))
        hidden = self._stage.run(hidden, cache)
        if self._sink is None:
            return hidden
        self._sink.send(hidden)
        return None


class Executor:
    """The caches of this rank and the operations on them. `step` of a frame returns logits on rank 0."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._rows = 0
        self._lane: list[Any] = []
        self._prefilling: dict[int, list[Any]] = {}

    @property
    def busy(self) -> bool:
        """Whether any sequence is under way."""
        return self._rows > 0 or bool(self._prefilling)

    @property
    def rows(self) -> int:
        """Sequences that decode."""
        return self._rows

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of all sequences, on this rank."""
        return sum(layer.nbytes for cache in (self._lane, *self._prefilling.values()) for layer in cache)

    def run(self, operations: Sequence[frames.Operation]) -> Any | None:
        """Do all operations of a frame, in order; the logits of its step, on rank 0."""
        logits = None
        for operation in operations:
            match operation:
                case frames.PrefillBatch(_, prompts):
                    self._prefill_batch(prompts)
                case frames.PrefillChunk(uid, tokens):
                    cache = self._prefilling.setdefault(uid, self._compute.make_cache())
                    self._compute.prefill([tokens], cache)
                case frames.Join(uid):
                    self._join(merge([self._prefilling.pop(uid)]), 1)
                case frames.Keep(rows):
                    self._keep(rows)
                case frames.Drop(uid):
                    self._prefilling.pop(uid, None)
                case frames.Step(tokens):
                    logits = self._compute.step(tokens, self._lane)
                case frames.ClearCache():
                    mx.clear_cache()
                case _:
                    pass  # not about caches
        return logits

    def _prefill_batch(self, prompts: Sequence[Sequence[int]]) -> None:
        lengths = [len(prompt) - 1 for prompt in prompts]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        cache = merge([self._compute.make_cache() for _ in prompts])
        if max(padding):
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        if longest:
            tokens = [[*prompt[:-1], *[0] * pad] for prompt, pad in zip(prompts, padding, strict=True)]
            self._compute.prefill(tokens, cache)
        if max(padding):
            for layer in cache:
                layer.finalize()
        self._join(cache, len(prompts))

    def _join(self, cache: list[Any], rows: int) -> None:
        if self._rows:
            for ours, theirs in zip(self._lane, cache, strict=True):
                ours.extend(theirs)
        else:
            self._lane = cache
        self._rows += rows

    def _keep(self, rows: Sequence[int]) -> None:
        self._rows = len(rows)
        if not rows:
            self._lane = []
            return
        kept = _integers(rows)
        for layer in self._lane:
            layer.filter(kept)


def merge(caches: list[list[Any]]) -> list[Any]:
    """Caches of several sequences as one batch, layer by layer."""
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


def _integers(values: Sequence[int] | Sequence[Sequence[int]]) -> mx.array:
    return mx.array(list(values), dtype=mx.int32)
