"""Prometheus metrics of the operator. docs/metrics.md is generated from the registry."""

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import RunnerReport

# They would be a second series for each counter, of use to nobody here.
disable_created_metrics()  # type: ignore[no-untyped-call]
_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STATES = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_WRITES = frozenset({"create", "update", "patch", "delete"})
_PLANNED = "Planned"
"""Reason of a restart that no failure led to."""


class Metrics:
    """All series; each instance has a registry of its own, so that tests and processes do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.labels: dict[str, tuple[str, ...]] = {"mlx_operator_instances": ("ready", "reason")}
        ProcessCollector(registry=self.registry)
        self.reconcile_seconds = self._histogram("reconcile_seconds", "Time of a reconcile, writes included.", _LATENCY)
        self.reconcile_errors = self._counter("reconcile_errors", "Reconciles that failed and were repeated.", "error")
        self.bugs = self._counter("bugs", "Exceptions that no rule foresees.")
        self.requests = self._counter(
            "kube_requests", "Requests to the API server; status 0: no answer came.", "verb", "resource", "status"
        )
        self.writes = self._counter("writes", "Writes that the API server carried out.", "verb", "resource")
        self.tasks = self._counter("tasks", "Tasks sent to runners by what became of them.", "task", "outcome")
        self.failures = self._counter("failures", "Failures of groups by the reason of their cause.", "reason")
        self.restarts = self._counter(
            "restarts", "Epochs started after the first, by the failure that led to them; Planned: none did.", "reason"
        )
        self.state_seconds = self._histogram(
            "runner_state_seconds", "How long runners were in a state before they left it.", _STATES, "state"
        )
        self.events_dropped = self._counter("events_dropped", "Events that were not recorded.")
        self.sweeps = self._counter("sweeps", "Full lists after the start.", "outcome")
        self.swept = self._counter("sweep_healed", "Instances that a sweep found outdated.")
        self.streams = self._gauge("report_streams", "Report streams that stand.")
        self.leader = self._gauge("leader", "1 while this process is the active one.")
        self._queue_depth = self._gauge("queue_depth", "Instances that wait for a worker.")
        self._queue_age = self._gauge("queue_age_seconds", "For how long the first of them has waited.")
        self._watched: dict[str, float] = {}
        self._watch_age = self._gauge("watch_age_seconds", "Time since the last event or sweep of a kind.", "resource")
        self._instances = _Instances()
        self.registry.register(self._instances)
        self._states: dict[str, tuple[int, RunnerState, float]] = {}

    def request(self, verb: str, resource: str, status: int) -> None:
        """Count a request to the API server."""
        self.requests.labels(verb, resource, str(status)).inc()
        if verb in _WRITES and 200 <= status < 300:
            self.writes.labels(verb, resource).inc()

    def watched(self, resource: str) -> None:
        """A watch or a sweep brought news of a kind."""
        if resource not in self._watched:
            self._watch_age.labels(resource).set_function(lambda: time.monotonic() - self._watched[resource])
        self._watched[resource] = time.monotonic()

    def queue(self, depth: Callable[[], float], age: Callable[[], float]) -> None:
        """Read the work queue at each scrape."""
        self._queue_depth.set_function(depth)
        self._queue_age.set_function(age)

    def instances(self, source: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Count the ModelInstances by the reason of their Ready condition at each scrape."""
        self._instances.source = source

    def reported(self, pod_uid: str, report: RunnerReport) -> None:
        """A runner told its state: count the time it spent in the one before. Running is Ready, as in status."""
        state = RunnerState.READY if report.state is RunnerState.RUNNING else report.state
        known = self._states.get(pod_uid)
        if known is not None and known[:2] == (report.epoch, state):
            return
        now = time.monotonic()
        if known is not None:
            self.state_seconds.labels(known[1]).observe(now - known[2])
        self._states[pod_uid] = (report.epoch, state, now)

    def forgotten(self, pod_uid: str) -> None:
        """A pod is gone, or out of touch: how long its runner stays in its state is not known any more."""
        self._states.pop(pod_uid, None)

    def written(self, before: Status, after: Status) -> None:
        """Count what a status that was written records for the first time."""
        known = {(failure.epoch, failure.time) for failure in before.history}
        for failure in after.history:
            if (failure.epoch, failure.time) not in known:
                self.failures.labels(failure.reason).inc()
        joined = max((record.epoch for record in after.runners), default=0)
        if joined > max((record.epoch for record in before.runners), default=0) and joined > 1:
            last = after.history[0] if after.history else None
            self.restarts.labels(last.reason if last is not None and last.epoch == joined - 1 else _PLANNED).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self.labels[f"mlx_operator_{name}"] = labels
        return Counter(f"mlx_operator_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self.labels[f"mlx_operator_{name}"] = labels
        return Gauge(f"mlx_operator_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        self.labels[f"mlx_operator_{name}"] = labels
        return Histogram(f"mlx_operator_{name}", text, labels, registry=self.registry, buckets=buckets)


class _Instances(Collector):
    def __init__(self) -> None:
        self.source: Callable[[], Iterable[Mapping[str, Any]]] = lambda: ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "mlx_operator_instances", "ModelInstances by their Ready condition.", labels=["ready", "reason"]
        )
        for (ready, reason), count in Tally(_ready(instance) for instance in self.source()).items():
            family.add_metric([ready, reason], count)
        yield family


def _ready(instance: Mapping[str, Any]) -> tuple[str, str]:
    conditions = (instance.get("status") or {}).get("conditions") or ()
    for condition in conditions:
        if condition.get("type") == ConditionType.READY:
            return str(condition.get("status")), str(condition.get("reason"))
    return "Unknown", "Unknown"
