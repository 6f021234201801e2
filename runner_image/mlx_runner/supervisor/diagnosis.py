"""What to say of a failure: reason and message, from what was observed. Pure.

The message is what happened and its evidence. Who it was and what to do next is the operator's to add.
"""

from dataclasses import dataclass

from mlx_operator_api.conditions import Reason
from mlx_operator_api.names import ring_port
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport, Sharding
from mlx_runner.quantity import quantity

from .evidence import Exit, meaningful


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`peer`: the rank that a PeerLost accuses, or that was waited for in vain."""

    reason: Reason
    message: str
    peer: int | None = None


def of_exit(exit_: Exit, report: RunnerReport) -> Diagnosis:
    """An engine ended that nobody had told to. A confident wrong cause would be worse than the bare exit code."""
    where = f"{exit_.what()} in {report.state}{_loading(report)}"
    if exit_.signal is not None and exit_.oom_kills > 0:
        limit = report.memory_limit_bytes
        limited = f"memory limit {quantity(limit)}" if limit else "no memory limit"
        return Diagnosis(Reason.OUT_OF_MEMORY, f"{where}, {limited}, oom_kill {exit_.oom_kills}")
    if exit_.code == 0 and report.rank > 0 and report.group == "present":
        # A worker's engine ends so by design when rank 0 says goodbye: then rank 0 is where to look.
        return Diagnosis(Reason.PEER_LOST, f"{where}, as after a goodbye of rank 0", peer=0)
    if exit_.code == 0:
        where += " without having been told to"
    said = meaningful(exit_.stderr)
    return Diagnosis(Reason.ENGINE_CRASHED, f"{where}: {said}" if said else where)


def of_deadline(
    reason: Reason,
    seconds: float,
    report: RunnerReport,
    sharding: Sharding,
    *,
    steps: int,
    started: bool,
    waiting_for: int | None = None,
) -> Diagnosis:
    """A transient state lasted longer than its deadline: say what was waited for, and for which rank if known."""
    peer = None
    match reason:
        case Reason.CONNECT_TIMEOUT:
            message = f"not connected within {seconds:g} s: {_missing(report, sharding)}"
        case Reason.LOAD_TIMEOUT:
            total = report.layers_total or "?"
            message = f"not loaded within {seconds:g} s: {report.layers_loaded}/{total} layers"
        case _:
            message = f"warm-up not done within {seconds:g} s, step {steps}"
            if waiting_for is not None:
                peer, message = waiting_for, f"{message}, waiting for rank {waiting_for}"
    return Diagnosis(reason, message if started else f"{message}; the engine had not started yet", peer)


def _missing(report: RunnerReport, sharding: Sharding) -> str:
    if report.waiting_for:
        missing = "still waiting for " + ", ".join(f"rank {rank}" for rank in report.waiting_for)
    else:
        missing = "the engine named no rank that it waits for"
    if sharding is Sharding.TENSOR:
        seen = "was seen listening" if report.ring_listening else "was not seen listening"
        missing += f"; ring port {ring_port(report.epoch)} {seen}"
    return missing


def _loading(report: RunnerReport) -> str:
    if report.state is not RunnerState.LOADING or not report.layers_total:
        return ""
    return f" at {report.layers_loaded}/{report.layers_total} layers"
