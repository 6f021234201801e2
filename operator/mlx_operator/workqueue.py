"""A queue of keys with the semantics of client-go's: what makes level-triggered reconciling safe.

A key is queued once however often it is added; one worker has it at a time; added while a worker has it, it runs
again afterwards. Failures back off per key, exponentially and capped; any `add` comes before the back-off.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


class WorkQueue(Generic[KeyT]):
    """See the module.

    Args:
        base: first back-off in seconds; doubles with each failure in a row.
        cap: longest back-off in seconds.
        spread: draws the jitter factor of a back-off.
    """

    def __init__(
        self,
        *,
        base: float = 0.05,
        cap: float = 5.0,
        spread: Callable[[], float] = lambda: random.uniform(0.8, 1.2),  # noqa: S311 (jitter is no secret)
    ) -> None:
        self._ready: asyncio.Queue[KeyT] = asyncio.Queue()
        self._dirty: dict[KeyT, float] = {}
        self._active: set[KeyT] = set()
        self._failures: Counter[KeyT] = Counter()
        self._timers: dict[KeyT, asyncio.TimerHandle] = {}
        self._base = base
        self._cap = cap
        self._spread = spread

    def __len__(self) -> int:
        """Keys that wait for a worker."""
        return len(self._dirty)

    @property
    def age(self) -> float:
        """Seconds for which the first of them has waited."""
        return time.monotonic() - next(iter(self._dirty.values())) if self._dirty else 0.0

    @property
    def idle(self) -> bool:
        """No key waits and none is being worked on; timers may still be pending."""
        return not self._dirty and not self._active

    def add(self, key: KeyT) -> None:
        """Run the key as soon as a worker is free."""
        if key in self._dirty:
            return
        self._dirty[key] = time.monotonic()
        if key not in self._active:
            self._ready.put_nowait(key)

    def add_after(self, key: KeyT, delay: float) -> None:
        """Run the key in `delay` seconds; of several times the earliest counts."""
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, delay)
        pending = self._timers.get(key)
        if pending is not None:
            if pending.when() <= when:
                return
            pending.cancel()
        self._timers[key] = loop.call_at(when, self._fire, key)

    def _fire(self, key: KeyT) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> KeyT:
        """Wait for a key; `done` must follow."""
        key = await self._ready.get()
        self._dirty.pop(key, None)
        self._active.add(key)
        return key

    def done(self, key: KeyT, *, ok: bool) -> None:
        """End the turn of a worker. `ok` forgets the key's failures, else it comes again after its back-off."""
        self._active.discard(key)
        if ok:
            self._failures.pop(key, None)
        else:
            self._failures[key] += 1
            exponent = min(self._failures[key] - 1, 32)
            self.add_after(key, min(self._cap, self._base * 2**exponent) * self._spread())
        if key in self._dirty:
            self._ready.put_nowait(key)

    def close(self) -> None:
        """Cancel all timers."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
