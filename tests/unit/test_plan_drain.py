"""A pod of a healthy group is taken away (a node drain): running requests may finish, and nothing waits for more."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from mlx_operator.decide.actions import SendTask
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import Shutdown
from tests.unit.scenes import ready, see
from tests.unit.simulator import Cluster


def take_away(cluster: Cluster, rank: int, *, evicted: bool = False) -> None:
    """Deleted, and its supervisor has got SIGTERM."""
    cluster.delete(f"tiny-{rank}")
    if evicted:
        disruption = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        cluster.pods[f"tiny-{rank}"].manifest["status"]["conditions"].append(disruption)
    cluster.supervisor(rank).publish(draining=True)


def shutdowns(cluster: Cluster) -> list[tuple[int, float]]:
    cluster.hear_all()
    made = cluster.reconcile(act=False)
    requests = [action.request for action in made.actions if isinstance(action, SendTask)]
    return [(r.rank, r.task.grace_seconds) for r in requests if isinstance(r.task, Shutdown)]


def target(cluster: Cluster, rank: int, why: str = "PreemptionByScheduler") -> None:
    """Somebody means to end the pod, and has not begun."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": why}
    cluster.pods[f"tiny-{rank}"].manifest["status"]["conditions"].append(condition)


@pytest.mark.parametrize("why", ["PreemptionByScheduler", "DeletionByTaintManager", "EvictionByEvictionAPI"])
def test_a_pod_that_is_to_be_disrupted_and_serves_all_the_same_costs_nothing(why: str) -> None:
    cluster = ready(2)
    target(cluster, 1, why)
    patches = len(cluster.patches)
    cluster.run(300)
    cluster.lose_report(1)
    cluster.reconcile()
    cluster.restart_operator()
    cluster.run(300)
    assert cluster.ready()
    assert (cluster.status.epoch, len(cluster.patches)) == (1, patches)


def cut_off(cluster: Cluster) -> None:
    lose_touch(cluster)
    cluster.wait(60)


ENDS: dict[str, Callable[[Cluster], object]] = {
    "it is deleted": lambda c: c.delete("tiny-1"),
    "it is over": lambda c: c.pods["tiny-1"].manifest["status"].update(phase="Failed"),
    "its supervisor drains": lambda c: c.supervisor(1).publish(draining=True),
    "its supervisor shuts down": lambda c: c.supervisor(1).publish(state=RunnerState.SHUTTING_DOWN),
    "its container has ended": lambda c: c.kill_container(1, reason="Error"),
    "its supervisor is silent for too long": cut_off,
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_disruption_explains_the_end_of_its_pod_when(end: Callable[[Cluster], object]) -> None:
    cluster = ready(2)
    target(cluster, 1)
    cluster.hear_all()
    cluster.reconcile()
    end(cluster)
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, Reason.EVICTED)
    assert "PreemptionByScheduler" in failure.message
    assert cluster.status.restarts == 0


def test_a_disruption_that_did_not_come_explains_nothing_that_another_rank_did() -> None:
    cluster = ready(2)
    target(cluster, 1)
    cluster.pods["tiny-0"].partitioned = True
    cluster.supervisor(1).fail(Reason.PEER_LOST, "connection to rank 0 was lost", peer=0)
    cluster.hear_all()
    cluster.lose_stream("tiny-0")
    cluster.reconcile()
    cluster.wait(60)
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (0, Reason.RUNNER_UNREACHABLE)


@pytest.mark.parametrize(("evicted", "reason"), [(False, Reason.POD_DELETED), (True, Reason.EVICTED)])
def test_rank_0_finishes_its_requests_before_the_other_ranks_end_when_a_pod_is_taken_away(
    evicted: bool, reason: Reason
) -> None:
    cluster = ready(3)
    take_away(cluster, 1, evicted=evicted)
    assert shutdowns(cluster) == [(0, 30.0)]
    assert cluster.status.history[0].reason is reason
    cluster.supervisor(0).publish(state=RunnerState.SHUTTING_DOWN)
    assert shutdowns(cluster) == []
    cluster.supervisor(0).publish(state=RunnerState.SHUTDOWN, group="absent")
    assert shutdowns(cluster) == [(1, 0.0), (2, 0.0)]
    cluster.run()
    assert cluster.ready()
    assert cluster.status.restarts == 0


def test_the_grace_is_the_shutdown_deadline_of_the_spec() -> None:
    cluster = ready(2, deadlines={"shutdown": "90s"})
    take_away(cluster, 1)
    assert shutdowns(cluster) == [(0, 90.0)]


def test_rank_0_drains_by_itself_when_its_own_pod_is_taken_away_and_the_others_follow_it() -> None:
    cluster = ready(3)
    take_away(cluster, 0)
    assert shutdowns(cluster) == []
    cluster.supervisor(0).publish(state=RunnerState.SHUTDOWN, group="absent")
    assert shutdowns(cluster) == [(1, 0.0), (2, 0.0)]


def lose_touch(cluster: Cluster) -> None:
    cluster.pods["tiny-1"].partitioned = True
    cluster.lose_stream("tiny-1")


HOPELESS: dict[str, Callable[[Cluster], object]] = {
    "its pod is gone": lambda c: c._vanish("tiny-1"),
    "its engine died": lambda c: c.kill_engine(1),
    "its engine has ended": lambda c: c.supervisor(1).publish(state=RunnerState.SHUTDOWN, group="absent"),
    "its container was killed": lambda c: c.kill_container(1),
    "its supervisor is out of touch": lose_touch,
    "another engine died": lambda c: c.supervisor(2).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1),
}


@pytest.mark.parametrize("change", HOPELESS.values(), ids=HOPELESS)
def test_no_request_can_finish_and_the_engines_end_at_once_when(change: Callable[[Cluster], object]) -> None:
    cluster = ready(3)
    take_away(cluster, 1)
    cluster.hear_all()
    change(cluster)
    cluster.hear_all()
    made = cluster.reconcile(act=False)
    sent = {a.request.rank: a.request.task for a in made.actions if isinstance(a, SendTask)}
    assert 0 in sent
    assert set(sent.values()) == {Shutdown(grace_seconds=0.0)}
    assert cluster.status.history


def test_a_pod_that_was_taken_away_from_an_idle_group_is_replaced_without_any_wait() -> None:
    cluster = ready(2)
    before = cluster.now
    cluster.delete("tiny-1")
    see(cluster)
    cluster.run(until=cluster.ready)
    assert (cluster.now - before).total_seconds() < 10


@pytest.mark.parametrize("stuck", [0, 1])
@pytest.mark.parametrize(("spec", "seconds"), [({}, 40), ({"deadlines": {"shutdown": "90s"}}, 100)])
def test_a_planned_restart_waits_for_an_engine_that_does_not_end_no_longer_than_its_deadline_and_ten_seconds(
    spec: dict[str, Any], seconds: int, stuck: int
) -> None:
    cluster = ready(2, **spec)
    cluster.change(serving={"maxQueue": 1})
    cluster.reconcile()
    begun = cluster.now
    for rank in (0, 1):
        ended = RunnerState.SHUTTING_DOWN if rank == stuck else RunnerState.SHUTDOWN
        cluster.supervisor(rank).running = None
        cluster.supervisor(rank).publish(state=ended, group="absent")
    while (cluster.now - begun).total_seconds() < seconds - 2:
        cluster.wait(1)
        cluster.hear_all()
        cluster.reconcile()
    assert [record.epoch for record in cluster.status.runners] == [1, 1]
    made = cluster.reconcile()
    assert made.requeue_at is not None
    assert made.requeue_at <= begun + timedelta(seconds=seconds)
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 2
    assert not cluster.status.history
