"""What follows from a failure: back-off, budget, a new epoch, or nothing until somebody acts."""

from datetime import timedelta

import pytest

from mlx_operator.decide import restart
from mlx_operator.decide.actions import CreatePod, DeletePod
from mlx_operator.decide.picture import Clock
from mlx_operator.decide.spec import RestartRules
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.tasks import Shutdown
from tests.unit.scenes import condition, ready, see
from tests.unit.simulator import START, Cluster


def spent(budget: int) -> Cluster:
    """A group whose rank 1 failed until nothing starts again."""
    cluster = ready(restartPolicy={"maxRestarts": budget})
    for _ in range(budget + 1):
        cluster.kill_engine(1)
        cluster.run(until=lambda: cluster.stalled() or cluster.ready())
        cluster.run(30)
    assert cluster.stalled()
    return cluster


def test_a_rank_that_fails_for_ever_spends_the_budget_and_leaves_everything_in_place() -> None:
    cluster = spent(2)
    assert condition(cluster, ConditionType.READY).reason is Reason.RESTART_BUDGET_EXHAUSTED
    assert cluster.status.restarts == 2
    assert set(cluster.pods) == {"tiny-0", "tiny-1"}
    assert cluster.status.history[0].epoch == cluster.status.epoch == 3
    assert [e.type for e in cluster.events if e.reason is Reason.RESTART_BUDGET_EXHAUSTED] == ["Warning"]
    patches = len(cluster.patches)
    cluster.wait(100_000)
    cluster.run()
    assert len(cluster.patches) == patches
    cluster.annotate(names.RETRY_ANNOTATION, "now")
    cluster.run()
    assert cluster.ready()
    assert (cluster.status.epoch, cluster.status.restarts) == (4, 0)


def test_a_budget_that_is_raised_after_it_was_spent_starts_the_group_again() -> None:
    cluster = spent(1)
    assert cluster.status.epoch == 2
    cluster.change(restartPolicy={"maxRestarts": 1, "backoff": {"initial": "3s"}})
    cluster.run(30)
    assert cluster.stalled(), "it gives no budget"
    cluster.change(restartPolicy={"maxRestarts": 9})
    cluster.run()
    assert cluster.ready()
    assert (cluster.status.epoch, cluster.status.restarts) == (3, 0)
    assert not any("the budget of 9 is spent" in line for patch in cluster.patches for line in patch.brief)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_hears_once_that_nothing_starts_again_also_when_its_engine_is_dead(rank: int) -> None:
    cluster = ready(restartPolicy={"maxRestarts": 1})
    for budget_is_spent in (False, True):
        cluster.sent.clear()
        cluster.kill_engine(rank)
        cluster.run(until=lambda: cluster.stalled() or cluster.ready())
        cluster.run(30)
        told = [s.request.task for s in cluster.sent if s.request.rank == 0]
        assert [task for task in told if isinstance(task, Shutdown) and task.final] == (
            [Shutdown(final=True)] if budget_is_spent else []
        )
    assert cluster.stalled()


def test_the_second_restart_of_a_window_waits_for_its_back_off() -> None:
    cluster = ready(restartPolicy={"backoff": {"initial": "20s"}})
    cluster.kill_engine(1)
    cluster.run()
    cluster.kill_engine(1)
    see(cluster)
    due = cluster.status.next_restart_at
    assert due is not None
    assert 18 <= (due - cluster.now).total_seconds() <= 23
    cluster.sent.clear()
    cluster.run(until=lambda: cluster.now >= due - timedelta(seconds=1))
    assert {s.request.task.name for s in cluster.sent} <= {TaskName.SHUTDOWN}
    assert all(record.epoch == 2 for record in cluster.status.runners)
    assert condition(cluster, ConditionType.RECONCILING).message == f"restart 2/5 at {due:%H:%M:%S}Z"
    cluster.run()
    assert cluster.ready()
    assert cluster.status.next_restart_at is None


def test_the_pod_of_a_rank_that_was_ended_in_good_order_may_go_without_a_word() -> None:
    cluster = ready(3, restartPolicy={"maxRestarts": 0})
    cluster.kill_container(1)
    cluster.supervisor(0).publish(group="absent")
    cluster.supervisor(2).publish(group="absent")
    cluster.run(20)
    assert [record.state for record in cluster.status.runners][2] is RunnerState.SHUTDOWN
    cluster.delete("tiny-2")
    cluster.run(30)
    assert cluster.status.runner(2).last_failure is None
    assert cluster.status.runner(2).state is RunnerState.SHUTDOWN


def test_no_epoch_starts_while_the_heartbeat_of_a_rank_is_overdue() -> None:
    """Its node may be going down: the stream is given up only after seconds of silence."""
    cluster = ready()
    cluster.pods["tiny-1"].partitioned = True
    cluster.wait(8)
    cluster.kill_engine(0)
    cluster.hear_all()
    cluster.reconcile()
    cluster.supervisor(1).fail(Reason.PEER_LOST, "connection to rank 0 was lost", peer=0)
    cluster.wait(6)
    cluster.hear_all()
    made = cluster.reconcile()
    assert [r.epoch for r in cluster.status.runners] == [1, 1]
    assert made.requeue_at is not None
    assert made.requeue_at - cluster.now <= timedelta(seconds=1)
    cluster.pods["tiny-1"].partitioned = False
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 2


def test_the_budget_is_full_again_after_a_sustained_ready_and_that_is_written_once() -> None:
    cluster = ready(restartPolicy={"maxRestarts": 1})
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.status.restarts == 1
    since = condition(cluster, ConditionType.READY).last_transition_time
    cluster.wait(30)
    cluster.hear_all()
    made = cluster.reconcile()
    assert made.requeue_at == since + timedelta(minutes=10)
    cluster.patches.clear()
    cluster.wait((made.requeue_at - cluster.now).total_seconds())
    cluster.hear_all()
    assert cluster.reconcile().requeue_at is None
    assert [patch.restarts for patch in cluster.patches] == [0]
    cluster.wait(100_000)
    cluster.hear_all()
    assert cluster.reconcile().requeue_at is None
    assert len(cluster.patches) == 1
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.ready()
    assert cluster.status.restarts == 1


@pytest.mark.parametrize("reason", [Reason.INSUFFICIENT_MEMORY, Reason.MODEL_UNSUPPORTED, Reason.MODEL_CORRUPT])
def test_a_hopeless_failure_is_stalled_at_once_until_the_spec_changes(reason: Reason) -> None:
    cluster = ready()
    cluster.supervisor(1).fail(reason, "the shard does not fit")
    cluster.run()
    assert cluster.stalled()
    assert condition(cluster, ConditionType.STALLED).reason is reason
    cluster.change(restartPolicy={"maxRestarts": 50})
    cluster.run()
    assert cluster.stalled(), "more budget does not help"
    assert cluster.status.epoch == 1
    cluster.change(serving={"maxQueue": 1})
    cluster.run()
    assert cluster.ready()


def test_a_hopeless_cause_that_comes_late_is_recorded_and_stops_the_group_at_the_next_epoch_at_the_latest() -> None:
    cluster = ready()
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    cluster.hear_all()
    cluster.reconcile()
    cluster.wait(2)
    assert see(cluster).reason is Reason.PEER_LOST
    assert (cluster.status.epoch, cluster.status.restarts) == (2, 1)
    cluster.supervisor(1).fail(Reason.MODEL_CORRUPT, "model.safetensors is truncated")
    assert see(cluster).reason is Reason.MODEL_CORRUPT
    assert cluster.status.restarts == 0
    cluster.run(until=lambda: cluster.supervisor(1).report.epoch == 2 and cluster.supervisor(1).running is None)
    cluster.supervisor(1).fail(Reason.MODEL_CORRUPT, "model.safetensors is truncated")
    cluster.run()
    assert cluster.stalled()
    assert cluster.status.epoch == 2


def test_a_pod_lost_before_its_rank_joined_costs_no_epoch() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: len(cluster.pods) == 2)
    cluster.delete("tiny-1")
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 1
    assert not cluster.status.history


def test_a_crash_loop_longer_than_our_back_off_gets_a_new_pod() -> None:
    cluster = ready()
    cluster.kill_container(1)
    see(cluster)
    status = cluster.pods["tiny-1"].manifest["status"]["containerStatuses"][0]
    status["lastState"] = status["state"]
    status["state"] = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed"}}
    made = cluster.reconcile(act=False)
    assert [a.name for a in made.actions if isinstance(a, DeletePod)] == ["tiny-1"]
    cluster._delete_pod(next(a for a in made.actions if isinstance(a, DeletePod)))
    cluster.run()
    assert cluster.ready()
    assert cluster.status.history[0].reason is Reason.OUT_OF_MEMORY


def test_a_rejected_task_is_told_once_and_the_runner_goes_on() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: cluster.sent != [] and cluster.supervisor(1).report.epoch == 1)
    request = cluster.sent[0].request.model_copy(update={"rank": 1, "epoch": 1})
    from mlx_operator_api.tasks import LoadModel

    cluster.supervisor(1).offer(request.model_copy(update={"task": LoadModel()}))
    cluster.run()
    assert cluster.ready()
    told = [e for e in cluster.events if e.reason is Reason.TASK_REJECTED]
    assert len(told) == 1
    assert "LoadModel rejected" in told[0].note
    assert "accepted_in=[RunnerConnected]" in told[0].note


RULES = RestartRules(max_restarts=5, initial=2.0, max=60.0, reset_after=timedelta(minutes=10))


def test_the_first_restart_is_at_once_then_the_delay_doubles_up_to_its_bound() -> None:
    delays = [restart.backoff(n, RULES, "seed") for n in range(10)]
    assert delays[0] == 0
    for number, delay in enumerate(delays[1:]):
        assert delay == pytest.approx(min(60, 2 * 2**number), rel=0.1)


def test_the_jitter_is_repeatable_differs_by_epoch_and_stays_within_ten_percent() -> None:
    assert restart.backoff(3, RULES, "uid/3") == restart.backoff(3, RULES, "uid/3")
    seen = {restart.backoff(3, RULES, f"uid/{epoch}") for epoch in range(50)}
    assert len(seen) == 50
    assert all(7.2 <= delay <= 8.8 for delay in seen)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_verdict_and_none_overspends(reason: Reason) -> None:
    verdict = restart.decide(reason, 5, RULES, "seed", Clock(START))
    assert verdict.restarts == 5
    assert (verdict.at is None) == (restart.counts(reason) or reason.retry.value == "Never")


def test_a_new_pod_is_made_for_a_group_that_backs_off() -> None:
    cluster = ready()
    cluster.delete("tiny-1")
    see(cluster)
    cluster._vanish("tiny-1")
    made = cluster.reconcile(act=False)
    assert [a.name for a in made.actions if isinstance(a, CreatePod)] == ["tiny-1"]
