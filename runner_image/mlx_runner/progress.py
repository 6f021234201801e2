"""Progress of the engine in shared memory: readable while the engine is frozen or holds the GIL.

A file of one page, mapped by both: the engine writes a step counter, what it does, for which rank it waits, and what it
holds in memory.
"""

import mmap
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_LAYOUT = struct.Struct("<QQIidIQ")
_SIZE = 4096


class Phase(IntEnum):
    """What the engine's main thread does."""

    IDLE = 0
    COMPUTING = 1
    WAITING = 2
    """For a rank: a consequence of whatever that rank does."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the engine last wrote. `waiting_for` is a rank or -1; `changed` is CLOCK_MONOTONIC seconds.

    `rows`: sequences that decode together; `cache_bytes`: of the keys and values of all sequences.
    """

    steps: int
    tokens: int
    phase: Phase
    waiting_for: int
    changed: float
    rows: int = 0
    cache_bytes: int = 0


class Progress:
    """The page. The engine writes it, the supervisor reads it."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), _SIZE)
        self._steps = 0
        self._tokens = 0
        self._held = (0, 0)

    def write(self, phase: Phase, *, waiting_for: int = -1, steps: int = 0, tokens: int = 0) -> None:
        """Record a phase; `steps` and `tokens` are added to the counters."""
        self._steps += steps
        self._tokens += tokens
        now = time.monotonic()
        _LAYOUT.pack_into(self._page, 0, self._steps, self._tokens, phase, waiting_for, now, *self._held)

    def holds(self, rows: int, cache_bytes: int) -> None:
        """What the engine holds from now on; recorded with the next phase."""
        self._held = (rows, cache_bytes)

    def read(self) -> Snapshot:
        """The last record. A torn read is possible and harmless: it is read again within a second."""
        steps, tokens, phase, *rest = _LAYOUT.unpack_from(self._page, 0)
        return Snapshot(steps, tokens, Phase(phase), *rest)

    def close(self) -> None:
        """Unmap the page."""
        self._page.close()
