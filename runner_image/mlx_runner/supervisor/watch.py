"""Is the engine frozen? Read from outside: its process state, its CPU time, its step counter.

A thread that is alive is no sign of health. A rank that waits for another one is a consequence, not a cause.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_operator_api.runner import SERVING, RunnerState
from mlx_runner.progress import Phase, Snapshot

POLL_SECONDS = 1.0
IDLE_CPU_SECONDS = 5.0
"""Computing with next to no CPU time for this long is no computing."""
_IDLE_CPU_SHARE = 0.02
"""Of one core: threads that wait for Python's lock while a stuck call holds it wake up 200 times a second."""
WAIT_MARGIN_SECONDS = 5.0
"""The rank that is waited for has its own watch, and the first word."""
STOPPED_SECONDS = 2.0
"""A debugger, a freezer or a scheduler that lets go again within this time is no failure."""
_STOPPED = frozenset("Tt")
_DISK = "D"
_COMPUTES = SERVING | {RunnerState.WARMING_UP}
"""Loading may wait for slow storage without CPU time; it has a deadline."""


@dataclass(frozen=True, slots=True)
class Process:
    """State letter of its main thread, CPU seconds (user and system) of all, and whether one waits for a disk."""

    state: str
    cpu: float
    disk: bool = False
    """Storage or swapped-out pages are slow, not the engine: the deadlines count, not its CPU time."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. `time` is CLOCK_MONOTONIC; `work`: requests are under way, or the rank is in a warm-up."""

    time: float
    process: Process
    progress: Snapshot
    state: RunnerState
    work: bool


@dataclass(frozen=True, slots=True)
class Stall:
    """What was observed; `peer` where the wait for that rank is what lasts too long."""

    message: str
    peer: int | None = None


class Watch:
    """Judges a sequence of samples of one engine."""

    def __init__(self, progress_seconds: float) -> None:
        self._deadline = progress_seconds
        self._stopped_since: tuple[float, float] | None = None
        self._cpu: tuple[float, float] | None = None
        self._step: tuple[tuple[int, Phase], float] | None = None

    def look(self, sample: Sample) -> Stall | None:
        """What is wrong, if anything."""
        return self._stopped(sample) or self._no_cpu(sample) or self._no_step(sample)

    def _stopped(self, sample: Sample) -> Stall | None:
        if sample.process.state not in _STOPPED:
            self._stopped_since = None
            return None
        # One that is stopped and continued over and over works in between.
        if self._stopped_since is None or self._stopped_since[0] != sample.process.cpu:
            self._stopped_since = (sample.process.cpu, sample.time)
        since = sample.time - self._stopped_since[1]
        if since < STOPPED_SECONDS:
            return None
        state = f"state {sample.process.state} for {since:.0f} s"
        return Stall(f"engine process stopped ({state}) in {sample.state}{_at(sample)}")

    def _no_cpu(self, sample: Sample) -> Stall | None:
        computing = sample.progress.phase is Phase.COMPUTING and sample.state in _COMPUTES
        cpu, since = self._cpu or (sample.process.cpu, sample.time)
        used, idle = sample.process.cpu - cpu, sample.time - since
        moved = used >= _IDLE_CPU_SHARE * IDLE_CPU_SECONDS or sample.progress.changed > since
        if not computing or moved or sample.process.disk:
            self._cpu = None
            return None
        self._cpu = (cpu, since)
        if idle < IDLE_CPU_SECONDS:
            return None
        return Stall(
            f"engine used {used:.2f} s of CPU in {idle:.0f} s while computing in {sample.state}, "
            f"process state {sample.process.state}{_at(sample)}"
        )

    def _no_step(self, sample: Sample) -> Stall | None:
        marker = (sample.progress.steps, sample.progress.phase)
        busy = sample.work or (sample.progress.phase is Phase.COMPUTING and sample.state in SERVING)
        if not busy or self._step is None or self._step[0] != marker:
            self._step = (marker, sample.time)
            return None
        since = sample.time - self._step[1]
        if sample.progress.phase is Phase.WAITING and sample.progress.waiting_for >= 0:
            if since < self._deadline + WAIT_MARGIN_SECONDS:
                return None
            peer = sample.progress.waiting_for
            return Stall(f"no answer from rank {peer} for {since:.0f} s in {sample.state}{_at(sample)}", peer)
        if since < self._deadline:
            return None
        return Stall(
            f"engine made no step for {since:.0f} s in {sample.state}, "
            f"process state {sample.process.state}{_at(sample)}"
        )


def _at(sample: Sample) -> str:
    quiet = sample.time - sample.progress.changed
    return f", step {sample.progress.steps}, last progress {quiet:.0f} s ago"


def read_process(pid: int, *, threads: bool = False, proc: Path = Path("/proc")) -> Process | None:
    """Read a process, and with `threads` whether any of them waits for a disk.

    None when it is gone, or cannot be read at the moment for want of file descriptors.
    """
    directory = proc / str(pid)
    if not (fields := _stat(directory)):
        return None
    disk = threads and any(_stat(directory / "task" / name)[:1] == [_DISK] for name in _names(directory / "task"))
    ticks = int(fields[11]) + int(fields[12])
    return Process(fields[0], ticks / os.sysconf("SC_CLK_TCK"), disk)


def _stat(directory: Path) -> list[str]:
    try:
        text = (directory / "stat").read_text()
    except OSError:
        return []
    # The command's name in parentheses may itself hold spaces and parentheses.
    return text.rpartition(")")[2].split()


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
