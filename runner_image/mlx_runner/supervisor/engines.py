"""At most one engine process in this pod, and the next one already started: imports take a second or two."""

import asyncio
import logging

from mlx_runner import channel

from . import engine_process, evidence
from .cgroup import Cgroup
from .config import Config
from .engine_process import EngineProcess

log = logging.getLogger(__name__)

_FIRST_BACKOFF = 1.0
_LAST_BACKOFF = 30.0


class Engines:
    """Gives out engines. A lock around every start and the wait for every end: never two processes at a time."""

    def __init__(self, config: Config, cgroup: Cgroup) -> None:
        self._config = config
        self._cgroup = cgroup
        self._lock = asyncio.Lock()
        self._spare: EngineProcess | None = None
        self._used: EngineProcess | None = None
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
            await self._end_used()
            engine = self._spare
            self._spare = None
            if engine is None or not engine.alive:
                engine = await engine_process.spawn(self._config, self._cgroup)
            engine.on_event = lambda event: None
            engine.on_exit = lambda exit_: None  # its user says what an end means now
            self._used = engine
            return engine

    def prepare(self, delay: float = 0.0) -> None:
        """Start the next engine as soon as the last one is gone. Does nothing while one is there or under way."""
        if self._closed or (self._refill is not None and not self._refill.done()):
            return
        self._refill = asyncio.create_task(self._prepare(delay), name="next-engine")

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
            if self._closed or self._spare is not None or (self._used is not None and self._used.alive):
                return
            try:
                self._spare = await engine_process.spawn(self._config, self._cgroup)
            except OSError as error:
                log.error("the next engine cannot be started: %s", error)
                asyncio.get_running_loop().call_later(self._next_backoff(), self.prepare)
                return
            self._spare.on_event = self._spare_said
            self._spare.on_exit = self._spare_ended

    def _spare_said(self, event: channel.Event) -> None:
        if isinstance(event, channel.Started):
            self._backoff = _FIRST_BACKOFF
        elif isinstance(event, channel.Failure):
            log.warning("an engine that no epoch used failed: %s", event.message)

    def _spare_ended(self, exit_: evidence.Exit) -> None:
        self._spare = None
        if self._closed:
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
