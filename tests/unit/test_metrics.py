"""What the operator counts, and when."""

from datetime import timedelta

import pytest

from mlx_operator.metrics import Metrics
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import GroupFailure, RunnerStatus, Status
from tests.unit.manifests import NOW, instance, report


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"mlx_operator_{name}", labels)


def joined(epoch: int, *failures: tuple[int, Reason]) -> Status:
    """Both ranks have joined an epoch; the failures newest first."""
    history = tuple(GroupFailure(epoch=at, time=NOW, reason=reason, rank=0, message="x") for at, reason in failures)
    return Status(epoch=epoch, history=history, runners=tuple(RunnerStatus(rank=r, epoch=epoch) for r in (0, 1)))


def test_a_write_counts_when_the_api_server_carried_it_out(metrics: Metrics) -> None:
    for verb, status in (("patch", 200), ("patch", 409), ("patch", 0), ("create", 201), ("get", 200), ("list", 200)):
        metrics.request(verb, "pods", status)
    assert value(metrics, "writes_total", verb="patch", resource="pods") == 1
    assert value(metrics, "writes_total", verb="create", resource="pods") == 1
    assert value(metrics, "writes_total", verb="get", resource="pods") is None
    assert value(metrics, "kube_requests_total", verb="patch", resource="pods", status="409") == 1


def test_a_failure_counts_once_however_often_the_status_is_written(metrics: Metrics) -> None:
    failed = joined(1, (1, Reason.OUT_OF_MEMORY))
    metrics.written(joined(1), failed)
    metrics.written(failed, failed.model_copy(update={"restarts": 1}))
    assert value(metrics, "failures_total", reason="OutOfMemory") == 1


def test_a_restart_counts_with_the_failure_that_led_to_it(metrics: Metrics) -> None:
    failed = joined(1, (1, Reason.OUT_OF_MEMORY))
    metrics.written(Status(), joined(1))
    metrics.written(failed, joined(2, (1, Reason.OUT_OF_MEMORY)))
    assert value(metrics, "restarts_total", reason="OutOfMemory") == 1
    metrics.written(joined(2, (1, Reason.OUT_OF_MEMORY)), joined(3, (1, Reason.OUT_OF_MEMORY)))
    assert value(metrics, "restarts_total", reason="Planned") == 1


def test_the_time_in_a_state_counts_when_a_runner_leaves_it(metrics: Metrics) -> None:
    loading = report(seq=1, state=RunnerState.LOADING)
    metrics.reported("pod-0", loading)
    metrics.reported("pod-0", report(seq=2, state=RunnerState.LOADING, layers_loaded=1))
    assert value(metrics, "runner_state_seconds_count", state="RunnerLoading") is None
    metrics.reported("pod-0", report(seq=3, state=RunnerState.READY))
    assert value(metrics, "runner_state_seconds_count", state="RunnerLoading") == 1
    metrics.reported("pod-0", report(seq=4, state=RunnerState.RUNNING))
    assert value(metrics, "runner_state_seconds_count", state="RunnerReady") is None, "as in status"
    metrics.reported("pod-0", report(seq=5, state=RunnerState.IDLE, epoch=2))
    assert value(metrics, "runner_state_seconds_count", state="RunnerReady") == 1


def test_a_runner_that_was_out_of_touch_has_no_known_time_in_its_state(metrics: Metrics) -> None:
    metrics.reported("pod-0", report(seq=1, state=RunnerState.LOADING))
    metrics.forgotten("pod-0")
    metrics.reported("pod-0", report(seq=9, state=RunnerState.READY))
    assert value(metrics, "runner_state_seconds_count", state="RunnerLoading") is None


def test_instances_are_counted_by_the_reason_of_ready(metrics: Metrics) -> None:
    ready = {"conditions": [{"type": "Ready", "status": "True", "reason": "Ready"}]}
    metrics.instances(lambda: [instance("a", status=ready), instance("b", status=ready), instance("c")])
    assert value(metrics, "instances", ready="True", reason="Ready") == 2
    assert value(metrics, "instances", ready="Unknown", reason="Unknown") == 1


def test_the_queue_and_the_watches_are_read_when_somebody_asks(metrics: Metrics) -> None:
    metrics.queue(lambda: 3, lambda: 1.5)
    metrics.watched("pods")
    age = value(metrics, "watch_age_seconds", resource="pods")
    assert (value(metrics, "queue_depth"), value(metrics, "queue_age_seconds")) == (3, 1.5)
    assert age is not None
    assert 0 <= age < timedelta(minutes=1).total_seconds()


def test_the_memory_of_the_process_is_told(metrics: Metrics) -> None:
    resident = metrics.registry.get_sample_value("process_resident_memory_bytes")
    assert resident is not None
    assert resident > 1 << 20
