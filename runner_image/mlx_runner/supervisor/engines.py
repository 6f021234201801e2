"""The engine in use, and the next one already started: imports take a second or two.

At most one engine belongs to an epoch. Once the group serves, a spare stands by beside it: it has done its imports,
holds no model and no epoch, sleeps, and makes the next restart shorter by its imports.
"""

import asyncio
import logging
import signal

from mlx_runner import channel
from mlx_runner.quantity import quantity

from . import engine_process, evidence
from .cgroup import Cgroup
from .config import Config
from .engine_process import EngineProcess

log = logging.getLogger(__name__)

_FIRST_BACKOFF = 1.0
_LAST_BACKOFF = 30.0
_SPARE_AFTER_SECONDS = 1.0
"""After the warm-up: the first requests, which may have waited for it, go first."""
_ROOM = 4
"""A memory limit of fewer bare engines than this is too small to give one away."""


def spare_bytes(memory_limit: int | None, bare_bytes: int) -> int:
    """Memory that a spare beside an engine takes; 0 where none is kept, because the limit is too small for it.

    Args:
        memory_limit: of the container, in bytes; None without one.
        bare_bytes: resident memory of an engine with its imports done; 0 where it is not known.
    """
    return 0 if memory_limit is not None and memory_limit < _ROOM * bare_bytes else bare_bytes


class Engines:
    """Gives out engines. A lock around every start and the wait for every end: never two in use at a time."""

    def __init__(self, config: Config, cgroup: Cgroup) -> None:
        self._config = config
        self._cgroup = cgroup
        self._lock = asyncio.Lock()
        self._spare: EngineProcess | None = None
        self._used: EngineProcess | None = None
        self._serving = False
        self._short_of_memory = False
        self._refill: asyncio.Task[None] | None = None
        self._backoff = _FIRST_BACKOFF
        self._closed = False

    async def take(self) -> EngineProcess:
        """A fresh engine for an epoch: the one started before, or a new one. The last one given out is killed first.

        Raises:
            OSError: no engine can be started.
        """
        async with self._lock:
            if self._closed:
                raise OSError("this supervisor is ending")
            self._serving = False
            await self._end_used()
            engine = self._spare
            self._spare = None
            if engine is None or not engine.alive:
                engine = await engine_process.spawn(self._config, self._cgroup)
            engine.adopt()
            engine.on_event = lambda event: None
            engine.on_exit = lambda exit_: None  # its user says what an end means now
            self._used = engine
            return engine

    def prepare(self, delay: float = 0.0) -> None:
        """Start the next engine once none is in use, or beside one that serves. Does nothing while one is there."""
        if self._closed or (self._refill is not None and not self._refill.done()):
            return
        self._refill = asyncio.create_task(self._prepare(delay), name="next-engine")

    def stand_by(self) -> None:
        """The engine in use serves: from now on, and until the next one is taken, a spare may stand beside it."""
        self._serving = True
        if self._used is not None and not self._room(self._used):
            limit, bare = quantity(self._cgroup.memory_limit() or 0), quantity(self._used.bare_bytes)
            log.info("no spare engine: memory limit %s, an engine without a model takes %s", limit, bare)
            return
        self.prepare(_SPARE_AFTER_SECONDS)

    async def close(self) -> None:
        """No engine any more: kill and reap whatever lives."""
        self._closed = True
        # Under the lock nothing is being started: a start that is cancelled half-way would leave a child behind.
        async with self._lock:
            if self._refill is not None:
                self._refill.cancel()
                await asyncio.gather(self._refill, return_exceptions=True)
            await self._end_used()
            if self._spare is not None:
                self._spare.kill()
                await self._spare.wait()
                self._spare = None

    async def _prepare(self, delay: float) -> None:
        await asyncio.sleep(delay)
        async with self._lock:
            used = self._used if self._used is not None and self._used.alive else None
            if self._closed or self._spare is not None or not (used is None or self._room(used)):
                return
            try:
                self._spare = await engine_process.spawn(self._config, self._cgroup, background=used is not None)
            except OSError as error:
                log.error("the next engine cannot be started: %s", error)
                asyncio.get_running_loop().call_later(self._next_backoff(), self.prepare)
                return
            self._spare.offer_to_oom_killer()
            self._spare.on_event = self._spare_said
            self._spare.on_exit = self._spare_ended

    def _room(self, used: EngineProcess) -> bool:
        """Whether an engine may stand beside the one in use."""
        counted = self._cgroup.memory_limit() is None or used.reserved_bytes > 0
        return self._serving and counted and not self._short_of_memory

    def _spare_said(self, event: channel.Event) -> None:
        if isinstance(event, channel.Started):
            self._backoff = _FIRST_BACKOFF
        elif isinstance(event, channel.Failure):
            log.warning("an engine that no epoch used failed: %s", event.message)

    def _spare_ended(self, exit_: evidence.Exit) -> None:
        self._spare = None
        if self._closed:
            return
        if exit_.signal_number == signal.SIGKILL and exit_.oom_kills > 0 and self._used is not None:
            # It died in the place of the engine in use. Another one would only be the next to die.
            self._used.forgive(1)
            self._short_of_memory = True
            log.warning("the kernel killed the spare engine for memory: none is kept any more")
            return
        delay = self._next_backoff()
        said = evidence.meaningful(exit_.stderr)
        log.warning(
            f"an engine that no epoch used ended: {exit_.what()}{': ' + said if said else ''}; next in {delay:g} s"
        )
        asyncio.get_running_loop().call_soon(self.prepare, delay)

    def _next_backoff(self) -> float:
        delay = self._backoff
        self._backoff = min(_LAST_BACKOFF, self._backoff * 2)
        return delay

    async def _end_used(self) -> None:
        if self._used is not None:
            self._used.kill()
            await self._used.wait()
            self._used = None
