"""How a container ended: the kubelet's word, and what the words of its Events add."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import RunnerStatus

from .messages import evidence_line, listed, one_line, signal_name
from .pods import PodView, Terminated

_SKEW_SECONDS = 2.0
"""Between the clocks of a node and of the operator."""
_TOLD_LATE_SECONDS = 10.0
"""How long after the end of a container its failure may have been recorded."""
_KILLED = re.compile(r"failed (liveness|startup) probe")
_PROBE = re.compile(r"(Liveness|Startup) probe failed: .*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class End:
    """One end of a container."""

    reason: Reason
    code: str
    """`exit code 137 (SIGKILL)`."""
    details: str
    """What is known besides; empty where nothing is."""
    signal: str | None
    log: str
    """Its last words; empty where it had none."""


def latest(pod: PodView, record: RunnerStatus) -> Terminated | None:
    """The end of the container that joined the epoch; None while the kubelet tells only of one before it.

    The successor's report may come before the kubelet's status, which then shows how an earlier container ended.
    """
    ended = pod.container.ended
    if ended is None or ended.finished is None or record.since is None:
        return ended
    failed = record.state is RunnerState.FAILED
    first = record.since - timedelta(seconds=_TOLD_LATE_SECONDS if failed else _SKEW_SECONDS)
    return ended if ended.finished >= first else None


def of(ended: Terminated, pod: PodView, notes: Sequence[str]) -> End:
    """Tell an end. `notes`: what Events say of this very container, newest first."""
    signal = signal_name(ended.signal) if ended.signal else None
    log = evidence_line(ended.message)
    oom, probe = ended.reason == "OOMKilled", _probe(notes)
    # No limit is no proof that the node's memory was short: say what was observed.
    memory = (f"memory limit {pod.memory_limit}" if pod.memory_limit else "no memory limit") if oom else ""
    killed = f"ended by the kubelet: {probe}" if probe and not oom else ""
    return End(
        reason=Reason.OUT_OF_MEMORY if oom else Reason.PROBE_FAILED if probe else Reason.CONTAINER_CRASHED,
        code=f"exit code {ended.exit_code}" + (f" ({signal})" if signal else ""),
        details=listed("OOMKilled" if oom else "", memory, killed, f"last words: {log}" if log else ""),
        signal=signal,
        log=log,
    )


def _probe(notes: Sequence[str]) -> str:
    """What the kubelet killed the container for, if it was a probe."""
    killed = next((note for note in notes if _KILLED.search(note)), None)
    if killed is None:
        return ""
    said = next((found[0] for note in notes if (found := _PROBE.search(note)) is not None), None)
    return one_line(said or killed.partition(": ")[2], 300)
