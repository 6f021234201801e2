"""A better cause of a failure that was told already: the Events in `kubectl describe` do not contradict status."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from mlx_operator.act.recorder import event
from mlx_operator.decide.actions import Notice
from mlx_operator_api.conditions import ConditionType, Reason
from tests.unit.scenes import condition, failures, ready, see
from tests.unit.simulator import Cluster


def peer_lost(cluster: Cluster) -> None:
    """Rank 0 lost rank 1, which says nothing for longer than it is waited for."""
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    cluster.pods["tiny-1"].partitioned = True
    cluster.hear_all()
    cluster.lose_stream("tiny-1")
    cluster.reconcile()
    cluster.wait(7)
    assert see(cluster).reason is Reason.PEER_LOST


def crashed(cluster: Cluster) -> None:
    """The kubelet has not said yet that it was for memory."""
    cluster.kill_container(1)
    status = cluster.pods["tiny-1"].manifest["status"]["containerStatuses"][0]
    status["state"]["terminated"]["reason"] = "Error"
    assert see(cluster).reason is Reason.CONTAINER_CRASHED
    status["state"]["terminated"]["reason"] = "OOMKilled"


TABLE: dict[str, tuple[Callable[[Cluster], None], Callable[[Cluster], None], Reason]] = {
    "node lost": (peer_lost, lambda c: c.lose_node("n2"), Reason.NODE_LOST),
    "pod deleted": (peer_lost, lambda c: c.delete("tiny-1"), Reason.POD_DELETED),
    "memory": (crashed, lambda c: None, Reason.OUT_OF_MEMORY),
}


@pytest.mark.parametrize(("first", "then", "better"), TABLE.values(), ids=TABLE)
def test_a_better_cause_has_one_more_warning_under_a_name_of_its_own(
    first: Callable[[Cluster], None], then: Callable[[Cluster], None], better: Reason
) -> None:
    cluster = ready()
    first(cluster)
    then(cluster)
    assert see(cluster).reason is better
    cluster.hear_all()
    cluster.reconcile()
    told = [e for e in cluster.events if e.type == "Warning"]
    assert [e.reason for e in told] == [Reason.RUNNER_FAILED, better]
    assert len(failures(cluster)) == 1
    assert told[1].note == condition(cluster, ConditionType.RUNNER_FAILED).message
    assert (told[1].epoch, told[1].rank) == (1, 1)
    names = [name_of(cluster, notice) for notice in told]
    assert len(set(names)) == 2
    assert names == sorted(names), "describe lists the better cause after the first"


def name_of(cluster: Cluster, notice: Notice) -> str:
    body = event(cluster.instance, notice, datetime(2026, 11, 23, tzinfo=UTC), "operator")
    return str(body["metadata"]["name"])


def test_a_cause_that_stays_has_no_second_event() -> None:
    cluster = ready()
    cluster.kill_engine(1)
    see(cluster)
    cluster.run()
    assert [e.reason for e in cluster.events if e.type == "Warning"] == [Reason.RUNNER_FAILED]


def test_a_better_cause_that_is_final_is_told_once_too() -> None:
    cluster = ready()
    peer_lost(cluster)
    cluster.pods["tiny-1"].partitioned = False
    cluster.supervisor(1).fail(Reason.MODEL_CORRUPT, "model.safetensors is truncated")
    see(cluster)
    cluster.run(until=lambda: cluster.stalled() or cluster.ready())
    assert [e.reason for e in cluster.events if e.type == "Warning"][:2] == [Reason.RUNNER_FAILED, Reason.MODEL_CORRUPT]
    assert len({name_of(cluster, e) for e in cluster.events}) == len(cluster.events)
