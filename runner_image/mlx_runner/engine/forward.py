"""Running the operations of a frame on this rank's part of the model.

`Executor` keeps the caches: lanes of rows that decode together, the cache of a long prompt that is being prefilled, and
the entries of the prefix cache. What differs between ranks and shardings is behind `Compute`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from . import frames
from .frames import Frame
from .hidden import HiddenIn, HiddenOut
from .pipeline import Stage
from .tail import Tail

SETTLE_STEPS = 64
"""What no layer reads of its cache (positions where nothing is rotated by them, the entries of a shadow) MLX only notes
down, step after step: about 2 KiB of host memory each. Computed so often, it is neither a leak nor work."""


class Compute(Protocol):
    """This rank's part of one forward pass."""

    def make_cache(self) -> list[Any]:
        """Caches of the layers of this rank, for one sequence."""

    def prefill(self, tokens: Sequence[Sequence[int]], cache: list[Any]) -> None:
        """Fill the cache with token ids (rows, positions)."""

    def step(self, tokens: Sequence[int], cache: list[Any]) -> Any | None:
        """One token a row: logits (rows, vocabulary) on rank 0, None elsewhere."""

    def first(self, tokens: Sequence[Sequence[int]], lengths: Sequence[int], cache: list[Any]) -> Any | None:
        """Both at once: fill the cache, and the logits that follow each row's first `lengths` tokens."""


class WholeModel:
    """All layers are here: the only rank, or a rank of a tensor group (whose layers talk to each other)."""

    def __init__(self, model: Any, tail: Tail, *, leader: bool) -> None:
        self._model = model
        self._tail = tail
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

    def first(self, tokens: Sequence[Sequence[int]], lengths: Sequence[int], cache: list[Any]) -> Any | None:
        """See `Compute`."""
        with self._tail.only(lengths):
            logits = self._model(_integers(tokens), cache=cache)
        mx.eval(logits, [layer.state for layer in cache])
        return logits[:, -1] if self._leader else None


class PipelineStage:
    """Some of the layers: hidden states come from the rank above and go to the rank below."""

    def __init__(self, stage: Stage, tail: Tail, source: HiddenIn | None, sink: HiddenOut | None) -> None:
        self._stage = stage
        self._tail = tail
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

    def first(self, tokens: Sequence[Sequence[int]], lengths: Sequence[int], cache: list[Any]) -> Any | None:
        """See `Compute`."""
        if self._sink is not None:
            self.prefill(tokens, cache)
            return None
        with self._tail.only(lengths):
            hidden = self._forward(tokens, cache)
        mx.eval(hidden, [layer.state for layer in cache])
        return self._stage.logits(hidden)

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


@dataclass(slots=True)
class _Lane:
    """Rows that decode together: their caches as one batch, layer by layer."""

    rows: int = 0
    cache: list[Any] = field(default_factory=list)
    steps: int = 0
    """Since the caches were settled."""


class Executor:
    """The caches of this rank and the operations on them. `step` of a frame returns logits on rank 0."""

    def __init__(self, compute: Compute) -> None:
        self.reusable = all(type(layer) is KVCache for layer in compute.make_cache())
        """Whether a part of a cache can be copied: not where a layer keeps a window or a state."""
        self._compute = compute
        self._lanes: dict[int, _Lane] = {}
        self._prefilling: dict[int, list[Any]] = {}
        self._entries: dict[int, list[Any]] = {}
        self._position_bytes = 0

    @property
    def busy(self) -> bool:
        """Whether any sequence is under way."""
        return any(lane.rows for lane in self._lanes.values()) or bool(self._prefilling)

    @property
    def position_bytes(self) -> int:
        """Bytes that one position of one sequence takes on this rank; 0 before the first sequence."""
        return self._position_bytes

    @property
    def rows(self) -> int:
        """Sequences that decode."""
        return sum(lane.rows for lane in self._lanes.values())

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values on this rank: of all sequences, and of those kept for reuse."""
        lanes = (lane.cache for lane in self._lanes.values())
        caches = (*lanes, *self._prefilling.values(), *self._entries.values())
        return sum(layer.nbytes for cache in caches for layer in cache)

    def run(self, frame: Frame) -> Any | None:
        """Do all operations of a frame, in order; the logits of its step, on rank 0."""
        lane = self._lanes.setdefault(frame.lane, _Lane())
        first = frame.step if isinstance(frame.step, frames.FirstStep) else None
        logits = None
        for operation in frame.operations:
            match operation:
                case frames.PrefillBatch(uids, prompts):
                    logits = self._prefill_batch(lane, uids, prompts, whole=first is not None)
                case frames.PrefillChunk(uid, tokens):
                    logits = self._prefill_chunk(uid, tokens, first)
                case frames.Join(uid):
                    self._join(lane, merge([self._prefilling.pop(uid)]), 1)
                case frames.Keep(rows):
                    _keep(lane, rows)
                case frames.Drop(uid):
                    self._prefilling.pop(uid, None)
                case frames.Step(tokens):
                    logits = self._compute.step(tokens, lane.cache)
                    _count_step(lane)
                case frames.FirstStep():
                    pass  # done with the prompts
                case _:
                    self._reuse(lane, operation)
        return logits

    def _reuse(self, lane: _Lane, operation: frames.Operation) -> None:
        match operation:
            case frames.Take(uid, entry, positions):
                self._prefilling[uid] = [beginning(layer, positions) for layer in self._entries[entry]]
            case frames.Save(row, entry):
                copy = [layer.extract(row) for layer in lane.cache]
                # Now: a copy that waits would keep the whole lane in memory.
                mx.eval([layer.state for layer in copy])
                self._entries[entry] = copy
            case frames.Forget(entry):
                del self._entries[entry]
            case frames.ClearCache():
                mx.clear_cache()
            case _:
                pass  # not about caches

    def _prefill_chunk(self, uid: int, tokens: Sequence[int], first: frames.FirstStep | None) -> Any | None:
        if uid not in self._prefilling:
            self._prefilling[uid] = self._compute.make_cache()
        if first is None:
            self._compute.prefill([tokens], self._prefilling[uid])
            return None
        whole = [*tokens, *first.tokens]
        return self._compute.first([whole], [len(whole)], self._prefilling[uid])

    def _prefill_batch(
        self, lane: _Lane, uids: Sequence[int], prompts: Sequence[Sequence[int]], *, whole: bool
    ) -> Any | None:
        lengths = [len(prompt) - (not whole) for prompt in prompts]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        begun = [self._prefilling.pop(uid) if uid in self._prefilling else self._compute.make_cache() for uid in uids]
        cache = merge(begun)
        if max(padding):
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        logits = None
        tokens = [
            [*prompt[:length], *[0] * (longest - length)] for prompt, length in zip(prompts, lengths, strict=True)
        ]
        if whole:
            logits = self._compute.first(tokens, lengths, cache)
        elif longest:
            self._compute.prefill(tokens, cache)
        if max(padding):
            for layer in cache:
                layer.finalize()
        self._join(lane, cache, len(prompts))
        return logits

    def _join(self, lane: _Lane, cache: list[Any], rows: int) -> None:
        if not self._position_bytes and self.reusable:
            self._position_bytes = sum(_position_bytes(layer) for layer in cache)
        if lane.rows:
            for ours, theirs in zip(lane.cache, cache, strict=True):
                ours.extend(theirs)
        else:
            lane.cache = cache
        lane.rows += rows


def _count_step(lane: _Lane) -> None:
    lane.steps += 1
    if lane.steps >= SETTLE_STEPS:
        lane.steps = 0
        mx.eval([layer.state for layer in lane.cache])


def _keep(lane: _Lane, rows: Sequence[int]) -> None:
    lane.rows = len(rows)
    if not rows:
        lane.cache = []
        return
    kept = _integers(rows)
    for layer in lane.cache:
        layer.filter(kept)


def merge(caches: list[list[Any]]) -> list[Any]:
    """Caches of several sequences as one batch, layer by layer."""
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


def beginning(cache: Any, positions: int) -> Any:
    """The first positions of a cache of one sequence, as a cache that can grow: it copies itself when it does."""
    part = KVCache()
    part.keys = cache.keys[..., :positions, :]
    part.values = cache.values[..., :positions, :]
    part.offset = positions
    return part


def _position_bytes(cache: Any) -> int:
    """Of one layer's cache of a batch; arrays (rows, heads, positions, size)."""
    arrays = [] if cache.keys is None else [cache.keys, cache.values]
    return sum(array.nbytes // (array.shape[0] * array.shape[2]) for array in arrays)


def _integers(values: Sequence[int] | Sequence[Sequence[int]]) -> mx.array:
    return mx.array(list(values), dtype=mx.int32)
