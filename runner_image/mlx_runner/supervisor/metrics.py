"""What Prometheus reads. A registry of its own: several supervisors may live in one process of a test.

Names and meanings follow vLLM's `vllm:*`; the buckets are those of OpenTelemetry's conventions for generative AI.
docs/metrics.md is generated from the registry.
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport, TaskAnswer
from mlx_runner import channel

from .supervisor import Supervisor
from .tickets import Observer, Outcome, Ticket

_FIRST_TOKEN = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_LATENCY = (0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68)
_QUEUE = (0.001, 0.01, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_PLANNED = "Planned"
"""Reason of a restart that no failure of this runner led to."""


class Metrics:
    """All metrics of a supervisor."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.registry = CollectorRegistry()
        self.labels: dict[str, tuple[str, ...]] = {
            "mlx_runner_state": ("state",),
            "mlx_runner_state_seconds": ("state",),
        }
        self.tasks = self.counter("tasks", "Tasks of the operator by what became of them.", "task", "phase")
        self.failures = self.counter("failures", "Failures of this runner by reason.", "reason")
        self.restarts = self.counter(
            "restarts",
            "Epochs after the first, by the reason for which this runner failed before; Planned where it did not fail.",
            "reason",
        )
        self.http_requests = self.counter(
            "http_requests", "Answers of the public API by endpoint and status.", "endpoint", "status"
        )
        self.requests = _Requests(self)
        supervisor.broker.observer = self.requests
        self.registry.register(_Standing(supervisor))
        self._last = supervisor.machine.report
        supervisor.machine.subscribe(self._on_report)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def told(self, answer: TaskAnswer) -> None:
        """Count an answered task."""
        self.tasks.labels(answer.outcome.name, answer.outcome.phase).inc()

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        """A counter of this registry; `_total` is added to its name."""
        self.labels[f"mlx_runner_{name}"] = labels
        return Counter(f"mlx_runner_{name}", text, labels, registry=self.registry)

    def histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        """A histogram of this registry."""
        return Histogram(f"mlx_runner_{name}", text, registry=self.registry, buckets=buckets)

    def _on_report(self, report: RunnerReport) -> None:
        last, self._last = self._last, report
        if report.failure is not None and (last.failure is None or last.epoch != report.epoch):
            self.failures.labels(report.failure.reason).inc()
        if report.epoch > last.epoch > 0:
            self.restarts.labels(last.failure.reason if last.failure else _PLANNED).inc()


class _Requests(Observer):
    """What becomes of the requests of clients; times are the client's, restarts of the group included."""

    def __init__(self, metrics: Metrics) -> None:
        self._outcomes = metrics.counter("requests", "Requests by how they ended.", "outcome")
        self._success = metrics.counter(
            "request_success", "Requests answered to their end, by finish reason.", "finished_reason"
        )
        self._resumed = metrics.counter("requests_resumed", "Requests that went on in the engine of a later epoch.")
        self._prompt = metrics.counter("prompt_tokens", "Tokens of prompts, each request once.")
        self._generated = metrics.counter("generation_tokens", "Tokens generated.")
        self._queries = metrics.counter("prefix_cache_queries", "Tokens of prompts that were looked up for reuse.")
        self._hits = metrics.counter("prefix_cache_hits", "Tokens of prompts that were reused instead of computed.")
        self._prompt_size = metrics.histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._answer_size = metrics.histogram("request_generation_tokens", "Tokens of a finished answer.", _TOKENS)
        self._queue = metrics.histogram(
            "request_queue_time_seconds", "From the request to its place in the engine.", _QUEUE
        )
        self._first_token = metrics.histogram(
            "time_to_first_token_seconds", "From the request to its first token, queue included.", _FIRST_TOKEN
        )
        self._per_token = metrics.histogram(
            "time_per_output_token_seconds", "Of a finished answer: mean time of a token after the first.", _PER_TOKEN
        )
        self._latency = metrics.histogram(
            "e2e_request_latency_seconds", "From the request to the end of its answer.", _LATENCY
        )
        for outcome in Outcome:
            self._outcomes.labels(outcome)

    def queued(self, ticket: Ticket, seconds: float) -> None:
        """A place in the engine."""
        self._queue.observe(seconds)

    def accepted(self, ticket: Ticket, prompt_tokens: int) -> None:
        """The prompt's size is known."""
        self._prompt.inc(prompt_tokens)
        self._prompt_size.observe(prompt_tokens)

    def given(self, ticket: Ticket, tokens: int) -> None:
        """Tokens of an answer."""
        self._generated.inc(tokens)

    def began(self, ticket: Ticket, seconds: float) -> None:
        """The first token."""
        self._first_token.observe(seconds)

    def resumed(self, ticket: Ticket) -> None:
        """Another engine has it."""
        self._resumed.inc()

    def ended(self, ticket: Ticket, outcome: Outcome, seconds: float, finished: channel.Finished | None) -> None:
        """How, and how long it took."""
        self._outcomes.labels(outcome).inc()
        if finished is None:
            return
        self._success.labels(finished.finish_reason).inc()
        self._latency.observe(seconds)
        self._queries.inc(finished.prompt_tokens)
        self._hits.inc(finished.cached_tokens)
        self._answer_size.observe(finished.completion_tokens)
        if ticket.first_token is not None and finished.completion_tokens > 1:
            answering = ticket.entered + seconds - ticket.first_token
            self._per_token.observe(answering / (finished.completion_tokens - 1))

    def turned_away(self, outcome: Outcome) -> None:
        """Not taken in."""
        self._outcomes.labels(outcome).inc()


class _Standing(Collector):
    """What is read from the supervisor when somebody asks."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._seconds = dict.fromkeys(RunnerState, 0.0)
        self._state, self._since = supervisor.machine.state, time.monotonic()
        supervisor.machine.subscribe(self._on_report)

    def collect(self) -> Iterator[Metric]:
        """One sample each."""
        report, broker = self._supervisor.heartbeat(), self._supervisor.broker
        self._on_report(report)
        state = GaugeMetricFamily("mlx_runner_state", "1 for the state of the runner.", labels=["state"])
        spent = CounterMetricFamily("mlx_runner_state_seconds", "Time spent in each state.", labels=["state"])
        for each in RunnerState:
            state.add_metric([each], float(each is report.state))
            spent.add_metric([each], self._seconds[each])
        yield from (state, spent)
        yield CounterMetricFamily(
            "mlx_runner_engine_steps", "Steps of the engine; each epoch counts from 0.", value=report.steps
        )
        held = self._supervisor.held
        gauges = {
            "mlx_runner_batch_size": ("Sequences that the engine decodes together.", held.rows if held else 0),
            "mlx_runner_kv_cache_bytes": (
                "Keys and values of all sequences, on this rank.",
                held.cache_bytes if held else 0,
            ),
            "mlx_runner_epoch": ("Epoch of the group.", report.epoch),
            "mlx_runner_layers_loaded": ("Layers loaded of the shard.", report.layers_loaded),
            "mlx_runner_num_requests_running": ("Requests in the engine.", broker.active),
            "mlx_runner_num_requests_waiting": ("Requests that wait for a place or a restart.", broker.waiting),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)

    def _on_report(self, report: RunnerReport) -> None:
        now = time.monotonic()
        self._seconds[self._state] += now - self._since
        self._state, self._since = report.state, now
