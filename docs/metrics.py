"""The page about metrics, as text: from the registries that /metrics of a runner and of the operator print."""

import pathlib
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from docs import pages
from mlx_operator.metrics import Metrics as OperatorMetrics
from mlx_runner.supervisor.config import Config
from mlx_runner.supervisor.metrics import Metrics
from mlx_runner.supervisor.supervisor import Supervisor
from mlx_runner.supervisor.tickets import Outcome

_HEAD = """\
# Metrics

Generated from `runner_image/mlx_runner/supervisor/metrics.py` and `operator/mlx_operator/metrics.py`: do not edit.

## Of a runner

Every runner pod serves `/metrics` for Prometheus on its control port, 8081; that of rank 0 also on its public port,
8080. Requests of clients are known to rank 0 only. Times are the client's: a request that was held, or went on in
another epoch after its engine was lost, took as long as its client waited. The names are those of vLLM's metrics behind
another prefix where there is such a one; the buckets follow OpenTelemetry's conventions for generative AI.

| Metric | Type | Labels | Meaning |
| --- | --- | --- | --- |
"""


_OUTCOMES = """
### How a request ends

The label `outcome` of `mlx_runner_requests_total`.

| Outcome | Meaning |
| --- | --- |
"""


_OPERATOR = """
## Of the operator

The operator serves `/metrics` on port 9090 (`--metrics-bind`); a replica that does not lead has only zeros to tell.
Beside these stand those of its process, such as `process_resident_memory_bytes` and `process_cpu_seconds_total`.

| Metric | Type | Labels | Meaning |
| --- | --- | --- | --- |
"""


def page() -> str:
    """docs/metrics.md: every metric with its type, labels and meaning."""
    metrics = Metrics(Supervisor(Config(uid="", rank=0, token="", state_dir=pathlib.Path("/nonexistent"))))
    meanings = pages.docstrings(Outcome)
    outcomes = "".join(f"| `{outcome}` | {meanings[outcome.name]} |\n" for outcome in Outcome)
    operator = OperatorMetrics()
    runners = _table(metrics.registry, metrics.labels)
    return _HEAD + runners + _OUTCOMES + outcomes + _OPERATOR + _table(operator.registry, operator.labels)


def exposed(metric: Metric) -> str:
    """The name that Prometheus sees: of a histogram without `_bucket`, `_sum` and `_count`."""
    return f"{metric.name}_total" if metric.type == "counter" else str(metric.name)


def _table(registry: CollectorRegistry, labels: Mapping[str, tuple[str, ...]]) -> str:
    rows = sorted(_rows(registry, labels))
    return "".join(f"| `{name}` | {kind} | {labelled} | {text} |\n" for name, kind, labelled, text in rows)


def _rows(registry: CollectorRegistry, labels: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str, str, str]]:
    for metric in registry.collect():
        if metric.name.startswith("process_"):
            continue
        labelled = ", ".join(f"`{label}`" for label in labels.get(metric.name, ()))
        yield exposed(metric), metric.type, labelled, metric.documentation
