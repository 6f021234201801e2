"""A new key of the operator: a group that serves goes on, unheard, until it is its turn."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from mlx_operator.decide.actions import ApplyService, DeletePod
from mlx_operator.decide.keys import AGAIN_SECONDS
from mlx_operator.decide.observed import NodeView
from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from tests.unit.simulator import Cluster
from tests.unit.test_plan_drain import target

OLD, NEW = "0123abcd", "fedcba98"


def rekeyed(turn: bool = False) -> Cluster:
    """It was Ready under the old key; an operator with a new one has started."""
    cluster = Cluster()
    cluster.settings = replace(cluster.settings, key_id=OLD)
    cluster.run()
    assert cluster.ready()
    cluster.wait(30)
    cluster.restart_operator()
    cluster.settings = replace(cluster.settings, key_id=NEW)
    cluster.turn = turn
    cluster.patches.clear()
    return cluster


def test_a_group_that_serves_waits_for_its_turn_without_a_write_though_nothing_is_heard_of_it() -> None:
    cluster = rekeyed()
    for _ in range(100):
        cluster.hear_all()
        made = cluster.reconcile()
        assert made.waits
        assert (made.actions, made.events) == ((), ())
        assert made.requeue_at is not None
        assert (made.requeue_at - cluster.now).total_seconds() <= AGAIN_SECONDS
        cluster.wait(30)
    assert cluster.views == {}, "the runners refuse the new key"
    assert cluster.patches == []
    cluster.service = None
    assert [type(action) for action in cluster.reconcile().actions] == [ApplyService]


@pytest.mark.parametrize("waited", [0, 3600])
def test_at_its_turn_it_gets_pods_of_the_new_key_and_no_failure(waited: int) -> None:
    cluster = rekeyed()
    cluster.reconcile()
    cluster.wait(waited)
    cluster.turn = True
    made = cluster.reconcile()
    assert not made.waits
    assert [action.name for action in made.actions if isinstance(action, DeletePod)] == ["tiny-0", "tiny-1"]
    cluster.turn = False
    cluster.run()
    assert cluster.ready()
    assert (cluster.status.epoch, cluster.status.restarts, cluster.status.history) == (2, 0, ())
    assert not cluster.reconcile().waits


def lose(cluster: Cluster) -> None:
    cluster.nodes["n2"] = NodeView("n2", False, cluster.now)


def unready(cluster: Cluster) -> None:
    cluster.pods["tiny-0"].manifest["status"]["conditions"][-1]["status"] = "False"


def restart_container(cluster: Cluster) -> None:
    cluster.kill_container(1)
    cluster._start_container(cluster.pods["tiny-1"])


TROUBLE: dict[str, Callable[[Cluster], object]] = {
    "a pod is deleted": lambda c: c.delete("tiny-1"),
    "a pod is gone": lambda c: c._vanish("tiny-1"),
    "a pod is to be disrupted": lambda c: target(c, 1),
    "a container started again": restart_container,
    "a node is lost": lose,
    "rank 0 is not ready": unready,
    "the spec changes": lambda c: c.change(serving={"maxQueue": 1}),
    "the pods are to look different": lambda c: c.change(runner={"image": "runner:2"}),
    "a restart is asked for": lambda c: c.annotate(names.RESTART_ANNOTATION, "now"),
    "it is suspended": lambda c: c.change(suspend=True),
}


@pytest.mark.parametrize("change", TROUBLE.values(), ids=TROUBLE)
def test_nothing_waits_for_a_turn_where(change: Callable[[Cluster], object]) -> None:
    cluster = rekeyed()
    assert cluster.reconcile().waits
    cluster.wait(60)
    change(cluster)
    assert not cluster.reconcile().waits
    cluster.run()
    if cluster.instance["spec"].get("suspend"):
        assert cluster.pods == {}
    else:
        assert cluster.ready()
        assert all(failure.reason is not Reason.RUNNER_UNREACHABLE for failure in cluster.status.history)
