"""Progress in coarse steps: enough for a person, too few to load the API server."""

from datetime import timedelta

from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.sizes import human_size
from mlx_operator_api.tasks import RunnerReport, TaskPhase

QUICK_SECONDS = 60.0
"""What is done within this time is shown in halves only; longer work in steps of 10 %."""


def text(report: RunnerReport, age: timedelta, *, from_hub: bool) -> str | None:
    """Progress of the present state, or None where there is nothing to show."""
    if report.state is RunnerState.IDLE and report.download_percent is not None and _downloads(report):
        # What is mounted is only read.
        work = "downloading" if from_hub else "verifying"
        size = f" of {human_size(report.download_bytes)}" if report.download_bytes else ""
        trouble = f", retrying: {report.download_trouble}" if report.download_trouble else ""
        return f"{work}: {_coarse(report.download_percent, 100, age)} %{size}{trouble}"
    if report.state in (RunnerState.LOADING, RunnerState.FAILED) and report.layers_total > 0:
        # What a failure stopped at is final, so exact.
        exact = report.state is RunnerState.FAILED
        done = report.layers_loaded if exact else _coarse(report.layers_loaded, report.layers_total, age)
        return f"{done}/{report.layers_total} layers"
    return None


def _downloads(report: RunnerReport) -> bool:
    """Files are missing, and the last attempt to get them has not failed."""
    outcomes = (t for t in report.tasks if t.name is TaskName.DOWNLOAD_MODEL and t.epoch == report.epoch)
    return not report.model_available and all(outcome.phase is not TaskPhase.FAILED for outcome in outcomes)


def _coarse(done: int, total: int, age: timedelta) -> int:
    steps = 2 if age.total_seconds() <= QUICK_SECONDS else 10
    return done * steps // total * total // steps


def awaited(report: RunnerReport | None) -> str:
    """Whom a rank that connects waits for; empty where it waits for nobody."""
    if report is None or not report.waiting_for:
        return ""
    ranks = ", ".join(str(rank) for rank in report.waiting_for[:8])
    return f"waiting for rank{'s' if len(report.waiting_for) > 1 else ''} {ranks}"
