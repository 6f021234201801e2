"""The page about a runner's metrics, as text: from the registry that /metrics prints."""

import pathlib
from collections.abc import Iterator

from prometheus_client.core import Metric

from docs import pages
from mlx_runner.supervisor.config import Config
from mlx_runner.supervisor.metrics import Metrics
from mlx_runner.supervisor.supervisor import Supervisor
from mlx_runner.supervisor.tickets import Outcome

_HEAD = """\
# Metrics of a runner

Generated from `runner_image/mlx_runner/supervisor/metrics.py`: do not edit.

Every runner pod serves `/metrics` for Prometheus on its control port, 8081; that of rank 0 also on its public port,
8080. Requests of clients are known to rank 0 only. Times are the client's: a request that was held, or went on in
another epoch after its engine was lost, took as long as its client waited. The names are those of vLLM's metrics behind
another prefix where there is such a one; the buckets follow OpenTelemetry's conventions for generative AI.

| Metric | Type | Labels | Meaning |
| --- | --- | --- | --- |
"""


_OUTCOMES = """
## How a request ends

The label `outcome` of `mlx_runner_requests_total`.

| Outcome | Meaning |
| --- | --- |
"""


def page() -> str:
    """docs/metrics.md: every metric with its type, labels and meaning."""
    metrics = Metrics(Supervisor(Config(uid="", rank=0, token="", state_dir=pathlib.Path("/nonexistent"))))
    rows = sorted(_rows(metrics))
    table = "".join(f"| `{name}` | {kind} | {labels} | {text} |\n" for name, kind, labels, text in rows)
    meanings = pages.docstrings(Outcome)
    outcomes = "".join(f"| `{outcome}` | {meanings[outcome.name]} |\n" for outcome in Outcome)
    return _HEAD + table + _OUTCOMES + outcomes


def exposed(metric: Metric) -> str:
    """The name that Prometheus sees: of a histogram without `_bucket`, `_sum` and `_count`."""
    return f"{metric.name}_total" if metric.type == "counter" else str(metric.name)


def _rows(metrics: Metrics) -> Iterator[tuple[str, str, str, str]]:
    for metric in metrics.registry.collect():
        labels = ", ".join(f"`{label}`" for label in metrics.labels.get(metric.name, ()))
        yield exposed(metric), metric.type, labels, metric.documentation
