"""A hundred groups of two on one API server: how often it is written to, and what a mass death looks like.

Counts are promises; times are only bounded. `make bench-operator` measures a thousand.
"""

import asyncio
import random
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from tests.cluster.waiting import tell
from tests.scale import report
from tests.scale.place import place
from tests.scale.stages import RUNNERS, Figures, Size, everything

SIZE = Size(instances=100, killed=20, idle_seconds=15.0, deadline=240.0)
KIB_EACH = 275.0
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """One run for all that is asked of it."""

    async def run(folder: Path, seed: int) -> Figures:
        async with place(folder, tell) as made:
            return await everything(made, SIZE, lambda stage, seen: tell(report.text(stage, seen)), seed)

    seed = random.randrange(1 << 32)  # noqa: S311 (no secret)
    tell(f"who dies: seed {seed}")
    return asyncio.run(run(tmp_path_factory.mktemp("scale"), seed))


def test_an_instance_becomes_ready_with_at_most_twelve_writes_of_children_and_status(figures: Figures) -> None:
    counts = figures.writes
    assert len(counts.status) == SIZE.instances
    assert {name: counts.each(name) for name in counts.status if counts.each(name) > 12} == {}
    assert set(counts.children.values()) == {2 + RUNNERS}, "Service, Secret and a pod for each rank, each once"
    assert counts.other == []


def test_an_instance_becomes_ready_with_at_most_five_events(figures: Figures) -> None:
    assert len(figures.writes.events) == SIZE.instances
    assert {name: count for name, count in figures.writes.events.items() if count > 5} == {}


def test_nothing_is_written_while_all_are_idle(figures: Figures) -> None:
    assert figures.streams == SIZE.instances * RUNNERS
    assert figures.idle_writes == []


def test_a_restarted_operator_hears_every_runner_again_and_writes_nothing(figures: Figures) -> None:
    assert figures.restart_writes == []


def test_all_groups_heal_when_runners_die_at_once_and_each_failure_names_who_died_of_what(figures: Figures) -> None:
    assert figures.wrong_causes == {}
    assert figures.unaffected_touched == []


def test_the_operators_metrics_tell_the_same(figures: Figures) -> None:
    metrics, hit = figures.metrics, len(figures.heal_writes.status)
    assert sum(value for name, value in metrics.items() if name.startswith("mlx_operator_failures_total")) == hit
    causes = (Reason.ENGINE_CRASHED, Reason.CONTAINER_CRASHED)
    assert sum(metrics.get(f"mlx_operator_restarts_total{{reason={cause}}}", 0) for cause in causes) == hit
    written = metrics["mlx_operator_writes_total{resource=modelinstances/status,verb=patch}"]
    assert written == sum(figures.heal_writes.status.values())
    assert metrics["mlx_operator_instances{ready=True,reason=Ready}"] == SIZE.instances
    assert metrics["mlx_operator_report_streams"] == SIZE.instances * RUNNERS
    assert metrics["mlx_operator_bugs_total"] == 0
    assert metrics["mlx_operator_queue_depth"] == 0


def test_the_operator_stays_far_below_its_memory_limit(figures: Figures) -> None:
    assert max(figures.memory[0], figures.restarted_memory[0]) < 200.0


def test_an_instance_costs_the_operator_little_memory_whether_it_came_or_was_found(figures: Figures) -> None:
    """With all that does not grow, such as buffers of connections. A body of each object would be 100 KiB more."""
    assert max(figures.kib_each) < KIB_EACH
