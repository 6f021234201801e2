"""Prometheus metrics of the operator."""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mlx_operator_api.conditions import ConditionType

# They would be a second series for each counter, of use to nobody here.
disable_created_metrics()  # type: ignore[no-untyped-call]
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All series; each instance has a registry of its own, so that tests and processes do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept = self.registry
        self.reconcile_seconds = Histogram(
            "mlx_operator_reconcile_seconds", "Time of one reconcile, writes included", buckets=_BUCKETS, registry=kept
        )
        self.reconcile_errors = Counter(
            "mlx_operator_reconcile_errors_total", "Reconciles that failed and were repeated", ["error"], registry=kept
        )
        self.bugs = Counter("mlx_operator_bugs_total", "Exceptions that no rule foresees", registry=kept)
        self.requests = Counter(
            "mlx_operator_kube_requests_total",
            "Requests to the API server",
            ["verb", "resource", "status"],
            registry=kept,
        )
        self.tasks = Counter("mlx_operator_tasks_total", "Tasks sent to runners", ["task", "outcome"], registry=kept)
        self.restarts = Counter(
            "mlx_operator_restarts_total", "Group failures by reason of the cause", ["reason"], registry=kept
        )
        self.events_dropped = Counter(
            "mlx_operator_events_dropped_total", "Events that were not recorded", registry=kept
        )
        self.sweeps = Counter("mlx_operator_sweeps_total", "Full lists after the start", ["outcome"], registry=kept)
        self.swept = Counter("mlx_operator_sweep_healed_total", "Instances that a sweep found outdated", registry=kept)
        self.streams = Gauge("mlx_operator_report_streams", "Report streams that stand", registry=kept)
        self.leader = Gauge("mlx_operator_leader", "1 while this process is the active one", registry=kept)
        self._watched: dict[str, float] = {}
        self._watch_age = Gauge(
            "mlx_operator_watch_age_seconds",
            "Time since the last event or sweep of a kind",
            ["resource"],
            registry=kept,
        )

    def request(self, verb: str, resource: str, status: int) -> None:
        """Count a request to the API server."""
        self.requests.labels(verb, resource, str(status)).inc()

    def watched(self, resource: str) -> None:
        """A watch or a sweep brought news of a kind."""
        if resource not in self._watched:
            self._watch_age.labels(resource).set_function(lambda: time.monotonic() - self._watched[resource])
        self._watched[resource] = time.monotonic()

    def queue_depth(self, depth: Callable[[], float]) -> None:
        """Read the depth of the work queue at each scrape."""
        gauge = Gauge("mlx_operator_queue_depth", "Instances that wait for a worker", registry=self.registry)
        gauge.set_function(depth)

    def instances(self, source: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Count the ModelInstances by the reason of their Ready condition at each scrape."""
        self.registry.register(_Instances(source))


class _Instances(Collector):
    def __init__(self, source: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self._source = source

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "mlx_operator_instances", "ModelInstances by their Ready condition", labels=["ready", "reason"]
        )
        for (ready, reason), count in Tally(_ready(instance) for instance in self._source()).items():
            family.add_metric([ready, reason], count)
        yield family


def _ready(instance: Mapping[str, Any]) -> tuple[str, str]:
    conditions = (instance.get("status") or {}).get("conditions") or ()
    for condition in conditions:
        if condition.get("type") == ConditionType.READY:
            return str(condition.get("status")), str(condition.get("reason"))
    return "Unknown", "Unknown"
