"""The story that Events tell of an epoch: whole, in order, and the same however many writes it took."""

import pytest

from mlx_operator.act.recorder import event
from mlx_operator.decide.actions import Notice
from mlx_operator.decide.writes import QUIET_SECONDS
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from tests.unit.manifests import NOW, instance
from tests.unit.scenes import ready
from tests.unit.simulator import Cluster

R = Reason
START = [R.PODS_CREATED, R.EPOCH_STARTED]


def reasons(cluster: Cluster) -> list[Reason]:
    return [notice.reason for notice in cluster.events]


def until(cluster: Cluster, state: RunnerState) -> None:
    """Go on until rank 1 is in a state, and keep it there."""
    cluster.run(until=lambda: "tiny-1" in cluster.pods and _state(cluster) is state)
    cluster.supervisor(1).running = None


def _state(cluster: Cluster) -> RunnerState | None:
    supervisor = cluster.pods["tiny-1"].supervisor
    return supervisor.report.state if supervisor is not None else None


def by_name(notices: list[Notice]) -> list[Reason]:
    """As `kubectl describe` lists them."""
    return [n.reason for n in sorted(notices, key=lambda n: str(event(instance(), n, NOW, "o")["metadata"]["name"]))]


def test_that_the_model_was_loaded_is_told_of_a_failure_in_the_warm_up_though_no_write_fell_between() -> None:
    quick, slow = Cluster(), Cluster()
    for cluster in (quick, slow):
        until(cluster, RunnerState.WARMING_UP)
    slow.run(QUIET_SECONDS * 8, until=lambda: False)
    assert reasons(slow) == [*START, R.MODEL_LOADED]
    assert reasons(quick) == START
    for cluster in (quick, slow):
        cluster.kill_engine(1)
        cluster.hear_all()
        cluster.reconcile()
    assert reasons(quick) == reasons(slow) == [*START, R.MODEL_LOADED, R.RUNNER_FAILED]
    assert [n.note for n in quick.events if n.reason is R.MODEL_LOADED] == [
        "2/2 runners hold their shard; layers of rank 0: 0-11, rank 1: 0-11"
    ]
    assert {n.epoch for n in quick.events} == {1}


def test_that_the_model_was_loaded_is_told_once_where_the_cause_is_found_later() -> None:
    cluster = Cluster()
    until(cluster, RunnerState.WARMING_UP)
    cluster.supervisor(0).fail(R.PEER_LOST, "connection to rank 1 was lost", peer=1)
    cluster.hear_all()
    cluster.reconcile()
    cluster.kill_engine(1)
    cluster.hear_all()
    cluster.reconcile()
    assert reasons(cluster) == [*START, R.MODEL_LOADED, R.RUNNER_FAILED]


def test_nothing_is_told_of_a_load_that_not_every_rank_got_through() -> None:
    cluster = Cluster()
    until(cluster, RunnerState.LOADING)
    cluster.run(QUIET_SECONDS * 8, until=lambda: False)
    cluster.kill_engine(1)
    cluster.hear_all()
    cluster.reconcile()
    assert reasons(cluster) == [*START, R.RUNNER_FAILED]


def test_the_next_epoch_tells_its_own_load() -> None:
    cluster = ready()
    cluster.kill_engine(0)
    cluster.run()
    assert [(n.epoch, n.reason) for n in cluster.events] == [
        (1, R.RUNNER_FAILED), (2, R.EPOCH_STARTED), (2, R.MODEL_LOADED), (2, R.READY),
    ]  # fmt: skip


def test_names_sort_as_the_story_went_whatever_came_in_the_way() -> None:
    cluster = Cluster()
    cluster.pull_error = "no such image"
    cluster.run()
    cluster.pull_error = None
    cluster.run()
    assert cluster.ready()
    cluster.change(runner={"podLabels": {"a": "b"}})
    cluster.run()
    cluster.kill_engine(1)
    cluster.run()
    cluster.change(suspend=True)
    cluster.run()
    told = [n.reason for n in cluster.events]
    assert told == [
        R.PODS_CREATED, R.IMAGE_PULL_FAILED, R.EPOCH_STARTED, R.MODEL_LOADED, R.READY,
        R.SPEC_CHANGED, R.PODS_CREATED, R.EPOCH_STARTED, R.MODEL_LOADED, R.READY, R.RUNNER_FAILED,
        R.EPOCH_STARTED, R.MODEL_LOADED, R.READY, R.SUSPENDED,
    ]  # fmt: skip
    assert by_name(cluster.events) == told


def test_an_endpoint_that_is_lost_or_late_is_told_where_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    lost, late = Cluster(), Cluster()
    lost.run(until=lost.ready)
    for cluster in (lost, late):
        monkeypatch.setattr(cluster, "_probe", lambda pod: False)
        for pod in cluster.pods.values():
            pod.manifest["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
        cluster.reconcile()  # in the second in which the first one became Ready
        cluster.run()
    assert reasons(lost) == [*START, R.MODEL_LOADED, R.READY, R.POD_NOT_READY]
    assert reasons(late) == [*START, R.MODEL_LOADED, R.POD_NOT_READY]
    for cluster in (lost, late):
        monkeypatch.undo()
        cluster.run()
        assert cluster.ready()
    # The repeat of Ready is folded into the first one.
    assert by_name(lost.events) == [*START, R.MODEL_LOADED, R.READY, R.READY, R.POD_NOT_READY]
    assert by_name(late.events) == [*START, R.MODEL_LOADED, R.POD_NOT_READY, R.READY]
