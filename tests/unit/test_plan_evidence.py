"""What was recorded of a failure survives whatever comes after it: restarts, other pods, operators, releases."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mlx_operator.decide.stored import read
from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.status import MAX_HISTORY, GroupFailure, LastFailure
from tests.unit.scenes import failures, ready
from tests.unit.simulator import Cluster


def failed_once() -> tuple[Cluster, GroupFailure, LastFailure]:
    cluster = ready()
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.ready()
    own = cluster.status.runner(1).last_failure
    assert own is not None
    assert own.signal == "SIGKILL"
    return cluster, cluster.status.history[0], own


def restart(cluster: Cluster) -> None:
    cluster.annotate(names.RESTART_ANNOTATION, "now")


def replace_pods(cluster: Cluster) -> None:
    cluster.change(runner={"image": "runner:2"})


def delete_pod(cluster: Cluster) -> None:
    cluster.delete("tiny-1")


def new_operator(cluster: Cluster) -> None:
    cluster.restart_operator()


def upgrade(cluster: Cluster) -> None:
    """Another default image and another key, as a new release of the chart may bring."""
    cluster.restart_operator()
    cluster.settings = replace(cluster.settings, runner_image="runner:2", key_id="fedcba9876")


def suspend_and_resume(cluster: Cluster) -> None:
    cluster.change(suspend=True)
    cluster.run()
    cluster.change(suspend=False)


def another_model(cluster: Cluster) -> None:
    cluster.change(model={"source": "pvc://models/other"})


AFTERWARDS = (restart, replace_pods, delete_pod, new_operator, upgrade, suspend_and_resume, another_model)


@pytest.mark.parametrize("then", AFTERWARDS, ids=lambda then: then.__name__)
def test_the_last_failure_and_the_history_survive(then: Callable[[Cluster], None]) -> None:
    cluster, group, own = failed_once()
    told = len(failures(cluster))
    then(cluster)
    cluster.run()
    assert cluster.ready()
    assert group in cluster.status.history
    if then is not delete_pod:
        assert cluster.status.runner(1).last_failure == own
        assert len(failures(cluster)) == told, "an old failure is no news"


def test_a_rank_that_goes_takes_its_record_along_and_the_groups_history_keeps_it() -> None:
    cluster, group, _ = failed_once()
    cluster.change(runners=1)
    cluster.run()
    assert cluster.ready()
    assert cluster.status.history == (group,)


def test_the_history_holds_the_last_five_newest_first() -> None:
    cluster = ready(restartPolicy={"maxRestarts": 20})
    for _ in range(MAX_HISTORY + 2):
        cluster.kill_engine(1)
        cluster.run(300)
        assert cluster.ready()
    epochs = [failure.epoch for failure in cluster.status.history]
    assert epochs == [7, 6, 5, 4, 3]


UNREADABLE: dict[str, Callable[[dict[str, Any]], None]] = {
    "a field that this release does not know": lambda status: status.update(novelty=1),
    "a field within a failure": lambda status: status["history"][0].update(novelty=1),
    "a state of a runner": lambda status: status["runners"][0].update(state="RunnerDreaming"),
    "a condition": lambda status: status["conditions"][0].update(type="Novelty"),
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_a_status_of_another_release_keeps_its_failures(damage: Callable[[dict[str, Any]], None]) -> None:
    cluster, group, own = failed_once()
    epoch = cluster.status.epoch
    cluster.restart_operator()
    damage(cluster.instance["status"])
    cluster.reconcile()
    assert cluster.status.epoch > epoch, "engines of the epoch may run"
    cluster.run(300)
    assert cluster.ready()
    assert cluster.status.history == (group,)
    assert cluster.status.runner(1).last_failure == own
    assert len(failures(cluster)) == 1


def test_a_reason_of_another_release_is_told_by_its_message() -> None:
    cluster, group, _ = failed_once()
    cluster.instance["status"]["history"][0]["reason"] = "Novelty"
    assert read(cluster.instance).history == (group.model_copy(update={"reason": Reason.UNKNOWN}),)


@pytest.mark.parametrize("rubbish", [None, "x", 3, [3, "x"], [{"rank": -1}], [{"epoch": "x"}]])
def test_a_status_that_is_rubbish_is_no_reason_to_fail(rubbish: Any) -> None:
    cluster = ready()
    cluster.instance["status"] |= {"history": rubbish, "runners": rubbish, "novelty": 1}
    cluster.restart_operator()
    cluster.run(300)
    assert cluster.ready()
