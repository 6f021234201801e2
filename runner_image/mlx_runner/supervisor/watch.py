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
"""Computing without CPU time for this long is no computing."""
WAIT_MARGIN_SECONDS = 5.0
"""The rank that is waited for has its own watch, and the first word."""
_STOPPED = frozenset("Tt")
_COMPUTES = SERVING | {RunnerState.WARMING_UP}
"""Loading may wait for slow storage without CPU time; it has a deadline."""


@dataclass(frozen=True, slots=True)
class Process:
    """State letter and CPU seconds (user and system) of a process."""

    state: str
    cpu: float


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
        self._stopped_since: float | None = None
        self._cpu: tuple[float, float] | None = None
        self._step: tuple[tuple[int, Phase], float] | None = None

    def look(self, sample: Sample) -> Stall | None:
        """What is wrong, if anything."""
        return self._stopped(sample) or self._no_cpu(sample) or self._no_step(sample)

    def _stopped(self, sample: Sample) -> Stall | None:
        if sample.process.state not in _STOPPED:
            self._stopped_since = None
            return None
        if self._stopped_since is None:
            self._stopped_since = sample.time
            return None
        # A debugger or a freezer that lets go at once is no failure: two looks.
        return Stall(f"engine process stopped (state {sample.process.state}) in {sample.state}{_at(sample)}")

    def _no_cpu(self, sample: Sample) -> Stall | None:
        computing = sample.progress.phase is Phase.COMPUTING and sample.state in _COMPUTES
        moved = self._cpu is None or sample.process.cpu != self._cpu[0] or sample.progress.changed > self._cpu[1]
        if not computing or moved:
            self._cpu = (sample.process.cpu, sample.time)
            return None
        assert self._cpu is not None  # noqa: S101 (narrowing: `moved` is true without it)
        idle = sample.time - self._cpu[1]
        if idle < IDLE_CPU_SECONDS:
            return None
        return Stall(
            f"engine used no CPU for {idle:.0f} s while computing in {sample.state}, "
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
    return f", step {sample.progress.steps}"


def read_process(pid: int, proc: Path = Path("/proc")) -> Process | None:
    """Read a process; None when it is gone."""
    try:
        text = (proc / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The command's name in parentheses may itself hold spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return Process(fields[0], ticks / os.sysconf("SC_CLK_TCK"))
