"""SIGTERM without a deletion: `kill 1` in a pod is a crash of its container, not a restart that is free of budget."""

from collections.abc import Callable

import pytest

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import ConnectToGroup, TaskPhase, TaskRequest
from tests.unit.scenes import condition, failures, ready, see
from tests.unit.simulated_supervisor import UID
from tests.unit.simulator import Cluster


def sigterm(cluster: Cluster, rank: int) -> None:
    """Its supervisor is told to stop and drains."""
    cluster.supervisor(rank).publish(state=RunnerState.SHUTTING_DOWN, since=cluster.now, draining=True)


def leave(cluster: Cluster, rank: int) -> None:
    """It has drained: the container ends, and the kubelet starts another."""
    pod = cluster.pods[f"tiny-{rank}"]
    cluster.kill_container(rank, reason="Completed")
    state = pod.manifest["status"]["containerStatuses"][0]["state"]
    state["terminated"]["exitCode"] = 0


def evict(cluster: Cluster) -> None:
    disruption = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
    cluster.pods["tiny-1"].manifest["status"]["conditions"].append(disruption)
    cluster.delete("tiny-1")


def test_a_bare_sigterm_is_a_crash_of_the_container_and_spends_the_budget() -> None:
    cluster = ready()
    sigterm(cluster, 1)
    cluster.hear_all()
    made = cluster.reconcile()
    assert not cluster.status.history, "its deletion may be watched a moment later"
    assert made.requeue_at is not None
    cluster.now = made.requeue_at
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, Reason.CONTAINER_CRASHED)
    assert failure.message == (
        "rank 1/2 pod tiny-1 on node n2: its supervisor was told to stop (SIGTERM) although nobody deletes its pod"
    )
    assert cluster.status.restarts == 1
    leave(cluster, 1)
    cluster.run()
    assert cluster.ready()
    assert len(failures(cluster)) == 1


@pytest.mark.parametrize(
    ("news", "reason"),
    [(lambda c: c.delete("tiny-1"), Reason.POD_DELETED), (evict, Reason.EVICTED)],
    ids=["deleted", "evicted"],
)
def test_a_deletion_that_is_watched_after_its_sigterm_was_reported_is_the_cause_and_free(
    news: Callable[[Cluster], None], reason: Reason
) -> None:
    cluster = ready()
    sigterm(cluster, 1)
    cluster.hear_all()
    cluster.reconcile()
    news(cluster)
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, reason)
    noted = cluster.status.runner(1).last_failure
    assert noted is not None
    assert noted.reason is reason
    assert cluster.status.restarts == 0


def test_a_pod_that_is_deleted_after_its_crash_was_recorded_does_not_become_the_cause() -> None:
    cluster = ready()
    sigterm(cluster, 1)
    cluster.hear_all()
    cluster.reconcile()
    cluster.wait(2)
    see(cluster)
    cluster.delete("tiny-1")
    assert see(cluster).reason is Reason.CONTAINER_CRASHED
    assert cluster.status.restarts == 1


def test_the_rejection_of_a_task_that_came_too_late_does_not_cover_the_failure() -> None:
    """The task was under way when the rank was told to stop: that it was rejected explains nothing."""
    cluster = Cluster()
    cluster.run(until=lambda: any(s.rank == 1 and s.report.state is RunnerState.IDLE for s in cluster.supervisors()))
    sigterm(cluster, 1)
    late = TaskRequest(instance_uid=UID, epoch=1, rank=1, task=ConnectToGroup(peers=()))
    assert cluster.supervisor(1).offer(late).phase is TaskPhase.REJECTED
    for _ in range(2):
        cluster.hear_all()
        cluster.reconcile()
        noted = cluster.status.runner(1).last_failure
        assert noted is not None
        assert noted.reason is Reason.CONTAINER_CRASHED
        assert condition(cluster, ConditionType.READY).reason is Reason.CONTAINER_CRASHED
    assert not [event for event in cluster.events if event.reason is Reason.TASK_REJECTED]


def test_an_exit_of_pid_1_without_a_word_is_a_crash_too() -> None:
    cluster = ready()
    leave(cluster, 1)
    failure = see(cluster)
    assert failure.reason is Reason.CONTAINER_CRASHED
    assert "container ended with exit code 0 in RunnerReady" in failure.message
    assert cluster.status.restarts == 1


def test_a_container_that_is_told_to_stop_again_and_again_ends_with_the_budget() -> None:
    cluster = ready()
    for _ in range(8):
        if cluster.stalled():
            break
        sigterm(cluster, 1)
        cluster.hear_all()
        cluster.reconcile()
        leave(cluster, 1)
        cluster.run(120, until=lambda: cluster.ready() or cluster.stalled())
        cluster.run(90)
    assert cluster.stalled()
    assert condition(cluster, ConditionType.STALLED).reason is Reason.RESTART_BUDGET_EXHAUSTED


def test_restarts_that_are_free_of_budget_wait_longer_each_time_and_start_anew_after_the_window() -> None:
    cluster = ready()
    delays = []
    for _ in range(5):
        cluster.delete("tiny-1")
        see(cluster)
        due = cluster.status.next_restart_at
        assert due is not None
        delays.append((due - cluster.now.replace(microsecond=0)).total_seconds())
        cluster.run()
        assert cluster.ready()
    assert delays[0] == 0
    for number, delay in enumerate(delays[1:]):
        assert 0.9 * 2 * 2**number <= delay <= 1.1 * 2 * 2**number + 1
    assert cluster.status.restarts == 0
    cluster.wait(601)
    cluster.delete("tiny-1")
    see(cluster)
    assert cluster.status.next_restart_at == cluster.now.replace(microsecond=0)
