"""What Prometheus reads. A registry of its own: several supervisors may live in one process of a test."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport, TaskAnswer

from .supervisor import Supervisor

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All metrics of a supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.registry = CollectorRegistry()
        self.tasks = Counter(
            "mlx_runner_tasks", "Tasks by what became of them.", ["task", "phase"], registry=self.registry
        )
        self.failures = Counter("mlx_runner_failures", "Failures by reason.", ["reason"], registry=self.registry)
        self.requests = Counter(
            "mlx_runner_requests", "Requests of clients by answer.", ["endpoint", "status"], registry=self.registry
        )
        self.tokens = Counter(
            "mlx_runner_tokens", "Tokens, of prompts and generated.", ["kind"], registry=self.registry
        )
        self.first_token = Histogram(
            "mlx_runner_time_to_first_token_seconds",
            "From the request to its first text, queue included.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.duration = Histogram(
            "mlx_runner_request_seconds",
            "From the request to the end of its answer.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.registry.register(_Standing(supervisor))
        self._failed_epoch = 0
        supervisor.machine.subscribe(self._on_report)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def told(self, answer: TaskAnswer) -> None:
        """Count an answered task."""
        self.tasks.labels(answer.outcome.name, answer.outcome.phase).inc()

    def _on_report(self, report: RunnerReport) -> None:
        if report.failure is not None and report.failure.epoch > self._failed_epoch:
            self._failed_epoch = report.failure.epoch
            self.failures.labels(report.failure.reason).inc()


class _Standing(Collector):
    """Gauges that are read from the supervisor when somebody asks."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> list[Metric]:
        """One sample each."""
        report, broker = self._supervisor.heartbeat(), self._supervisor.broker
        state = GaugeMetricFamily("mlx_runner_state", "1 for the state of the runner.", labels=["state"])
        for name in RunnerState:
            state.add_metric([name], float(name is report.state))
        single = {
            "mlx_runner_epoch": ("Epoch of the group.", report.epoch),
            "mlx_runner_steps": ("Steps of the engine of this epoch.", report.steps),
            "mlx_runner_requests_active": ("Requests in the engine.", broker.active),
            "mlx_runner_requests_waiting": ("Requests that wait for a place or a restart.", broker.waiting),
            "mlx_runner_layers_loaded": ("Layers loaded of the shard.", report.layers_loaded),
        }
        return [state, *(GaugeMetricFamily(name, text, value=value) for name, (text, value) in single.items())]
