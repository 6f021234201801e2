"""The sum of a rank's memory, made before any weights are read.

Weights in the type they will have, keys and values of the requests in work, and the rest: what the processes of the
container use already, the prompt cache, the buffers that MLX keeps for reuse, keys and values once more (a request
that joins others has them all copied), and the largest intermediate results of a prefill. On a CPU attention computes
its scores in memory, so those grow with the context.

Measured with 125 M parameters in float32 and 8 requests of 2048 tokens, on a CPU: 1260 MiB at most where this sum
says 1283 MiB.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_runner.quantity import quantity

from .blocks import BLOCK, blocks
from .caches import CacheSize
from .failures import EngineError

PREFILL_POSITIONS = 256
"""Of one chunk; see the scheduler."""
LEAST_TOKENS = 1024
"""A model that cannot take one request of this many tokens is refused, unless its context is shorter."""
_REUSE_BYTES = 32 << 20
"""MLX keeps freed buffers up to this size (its default on a CPU)."""
_F32 = 4
_MARGIN = 1.05
"""What the C library's allocator and the interpreter take beside."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the intermediate results of a prefill follow from; 0 where the configuration does not say."""

    hidden: int
    intermediate: int
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        """From config.json, by the names that models use."""
        inner = config.get("text_config")
        places = (config, inner if isinstance(inner, dict) else {})

        def find(*names: str) -> int:
            found = (place.get(name) for name in names for place in places)
            return next((value for value in found if isinstance(value, int)), 0)

        return cls(
            find("hidden_size", "n_embd", "d_model"),
            find("intermediate_size", "ffn_hidden_size", "n_inner"),
            find("num_attention_heads", "n_head", "n_heads"),
            find("vocab_size"),
        )

    def workspace(self, context: int, rows: int) -> int:
        """Bytes of one layer's results for a chunk (scores once raw and once normalised), and of the logits."""
        chunk = min(PREFILL_POSITIONS, context)
        scores = 2 * self.heads * chunk * context
        results = chunk * (4 * self.hidden + 3 * self.intermediate)
        return _F32 * (scores + results + 3 * rows * self.vocabulary)


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank has to hold."""

    weights: int
    largest: int
    """Of its tensors as stored: it is there twice while it is cast."""
    caches: tuple[CacheSize, ...]
    limit: int | None

    def keys_and_values(self, positions: int, rows: int) -> int:
        """Bytes of requests in work."""
        return rows * sum(cache.bytes(positions) for cache in self.caches)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the spec says; `context` None: not said."""

    context: int | None
    rows: int
    model_context: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What requests may use. `tokens`: rows times the longest of them, in blocks; None: nothing bounds it."""

    context: int
    rows: int
    tokens: int | None = None


class Sum:
    """The sums of a group, with the parts that are alike on every rank."""

    def __init__(self, shape: Shape, base: int, prompt_cache: int = 0) -> None:
        self._shape = shape
        self._base = base
        self._prompt_cache = prompt_cache

    def needed(self, rank: Rank, context: int, rows: int, held: int | None = None) -> int:
        """Bytes in all; `held`: positions of each row where that is less than the context."""
        caches = rank.keys_and_values(held or context, rows)
        rest = self._base + _REUSE_BYTES + rank.largest + self._shape.workspace(context, rows) + self._prompt_cache
        return int((rank.weights + 2 * caches + rest) * _MARGIN)

    def budget(self, own: Rank, others: Sequence[Rank], wish: Wish) -> Budget:
        """What this rank, and the others as far as they are known, leave for requests.

        A `context` that is set is promised to all `rows` at once. Without one the requests share what is there.

        Raises:
            EngineError: it does not fit on this rank; with the sum.
        """
        if wish.context is not None:
            if own.limit is not None and self.needed(own, wish.context, wish.rows) > own.limit:
                raise self._refusal(own, wish.context, wish.rows, wish)
            return Budget(wish.context, wish.rows)
        least = min(LEAST_TOKENS, wish.model_context)
        if own.limit is not None and self.needed(own, least, 1) > own.limit:
            raise self._refusal(own, least, 1, wish)
        most = blocks(wish.model_context) * wish.rows
        limited = [rank for rank in (own, *others) if rank.limit is not None]
        fitting = min((self._fitting(rank, most, wish) for rank in limited), default=most)
        if fitting >= most:
            return Budget(wish.model_context, wish.rows)
        tokens = max(blocks(least), fitting)
        return Budget(min(wish.model_context, tokens), wish.rows, tokens)

    def _fitting(self, rank: Rank, most: int, wish: Wish) -> int:
        """The most tokens, in blocks, with which a rank keeps its limit."""

        def fits(count: int) -> bool:
            tokens = count * BLOCK
            rows = min(wish.rows, count)
            context = min(wish.model_context, tokens)
            assert rank.limit is not None  # noqa: S101 (narrowing)
            return self.needed(rank, context, rows, -(-tokens // rows)) <= rank.limit

        return _most(most // BLOCK, fits) * BLOCK

    def _refusal(self, rank: Rank, context: int, rows: int, wish: Wish) -> EngineError:
        caches, needed = rank.keys_and_values(context, rows), self.needed(rank, context, rows)
        rest = needed - rank.weights - caches
        assert rank.limit is not None  # noqa: S101 (narrowing)
        sums = f"needs {quantity(needed)} = weights {quantity(rank.weights)} + KV {quantity(caches)}"
        where = f"{rows} x {context} tokens"
        process = self._base + _REUSE_BYTES
        reuse = f"prompt cache {quantity(self._prompt_cache)}, " if self._prompt_cache else ""
        work = rest - process - self._prompt_cache
        parts = f"process {quantity(process)}, {reuse}copies and prefill {quantity(work)}"
        message = f"{sums} ({where}) + {quantity(rest)} ({parts}); limit {quantity(rank.limit)}"
        return EngineError(Reason.INSUFFICIENT_MEMORY, f"{message}: {self._remedy(rank, wish, needed)}")

    def _remedy(self, rank: Rank, wish: Wish, needed: int) -> str:
        if needed - self._prompt_cache <= (rank.limit or 0):
            return "spec.serving.promptCacheBytes 0 would fit"
        if wish.context is None:
            return "even one short request does not fit"
        context, limit = wish.context, rank.limit or 0
        shorter = _most(context // BLOCK, lambda count: self.needed(rank, count * BLOCK, wish.rows) <= limit) * BLOCK
        fewer = _most(wish.rows, lambda rows: self.needed(rank, context, rows) <= limit)
        options = [f"contextLength {shorter}"] if shorter else []
        options += [f"maxConcurrentRequests {fewer}"] if fewer else []
        if not options:
            return "weights and process leave nothing for requests"
        return f"spec.serving.{' or '.join(options)} would fit"


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to a limit that fits, 0 without any."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def resident_bytes() -> int:
    """Of this process and of its supervisor, which shares the container."""
    return sum(_resident(process) for process in ("self", str(os.getppid())))


def _resident(process: str) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0  # a supervisor that has just ended: this process follows
    return pages * os.sysconf("SC_PAGE_SIZE")
