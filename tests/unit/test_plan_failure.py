"""The failure of an epoch: one cause, recorded before anything is changed; then a new epoch in the same pods."""

from datetime import timedelta
from typing import Any

import pytest

from mlx_operator.decide import restart
from mlx_operator.decide.actions import CreatePod, DeletePod, SendTask
from mlx_operator.decide.picture import Clock
from mlx_operator.decide.spec import RestartRules
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.status import Condition, GroupFailure
from tests.unit.simulator import START, Cluster


def ready(runners: int = 2, **spec: Any) -> Cluster:
    cluster = Cluster(runners=runners, **spec)
    cluster.run()
    assert cluster.ready()
    cluster.patches.clear()
    cluster.events.clear()
    cluster.sent.clear()
    return cluster


def see(cluster: Cluster) -> GroupFailure:
    """The operator hears everything and plans once; the last recorded failure."""
    cluster.hear_all()
    cluster.reconcile()
    assert cluster.status.history, cluster.status.brief
    return cluster.status.history[0]


def condition(cluster: Cluster, kind: ConditionType) -> Condition:
    found = cluster.status.condition(kind)
    assert found is not None
    return found


def failures(cluster: Cluster) -> list[str]:
    return [event.note for event in cluster.events if event.reason is Reason.RUNNER_FAILED]


def test_a_killed_engine_is_in_status_with_the_first_pass_and_named_by_the_grammar() -> None:
    cluster = ready()
    cluster.kill_engine(1)
    failure = see(cluster)
    assert (failure.epoch, failure.rank, failure.reason) == (1, 1, Reason.ENGINE_CRASHED)
    assert failure.consequences == (0,)
    failed = condition(cluster, ConditionType.RUNNER_FAILED)
    assert failed.status == "True"
    assert failed.message == (
        "rank 1/2 pod tiny-1 on node n2: engine killed by signal 9 (SIGKILL) in RunnerReady; restart 1/5 at "
        "15:00:02Z; read the evidence in the message and the log: kubectl logs tiny-1"
    )
    assert condition(cluster, ConditionType.READY).reason is Reason.ENGINE_CRASHED
    assert cluster.status.epoch == 2
    assert cluster.status.runner(1).last_failure is not None
    assert cluster.status.runner(1).state is RunnerState.FAILED


def test_the_pass_that_records_a_failure_starts_nothing_but_ends_the_others() -> None:
    cluster = ready(3)
    cluster.kill_engine(1)
    cluster.hear_all()
    made = cluster.reconcile(act=False)
    sends = [(a.request.rank, a.request.task.name, a.request.epoch) for a in made.actions if isinstance(a, SendTask)]
    assert sends == [(0, TaskName.SHUTDOWN, 1), (2, TaskName.SHUTDOWN, 1)]


def test_a_group_recovers_in_the_same_pods_with_one_warning_and_keeps_the_evidence() -> None:
    cluster = ready()
    uids = [pod.manifest["metadata"]["uid"] for pod in cluster.pods.values()]
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.ready()
    assert [pod.manifest["metadata"]["uid"] for pod in cluster.pods.values()] == uids
    assert (cluster.status.epoch, cluster.status.restarts) == (2, 1)
    assert len(failures(cluster)) == 1
    failure = cluster.status.runner(1).last_failure
    assert failure is not None
    assert (failure.epoch, failure.signal, failure.state) == (1, "SIGKILL", RunnerState.READY)
    failed = condition(cluster, ConditionType.RUNNER_FAILED)
    assert (failed.status, failed.reason) == ("False", Reason.RECOVERED)
    assert "engine killed by signal 9" in failed.message


def test_runner_failed_is_true_until_the_group_is_ready_again() -> None:
    cluster = ready()
    cluster.kill_engine(1)
    cluster.run()
    values = [(p.condition(ConditionType.RUNNER_FAILED), p.condition(ConditionType.READY)) for p in cluster.patches]
    for failed, is_ready in values:
        assert failed is not None
        assert is_ready is not None
        assert (failed.status == "True") == (is_ready.status == "False")


@pytest.mark.parametrize("reports_first", [0, 1])
def test_peer_lost_never_becomes_the_cause_when_a_rank_has_a_reason_of_its_own(reports_first: int) -> None:
    cluster = ready()
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    if reports_first == 0:
        cluster.hear_all()
        cluster.reconcile()
        assert not cluster.status.history
        assert condition(cluster, ConditionType.RUNNER_FAILED).reason is Reason.PEER_LOST
    cluster.kill_engine(1)
    failure = see(cluster)
    assert (failure.rank, failure.reason, failure.consequences) == (1, Reason.ENGINE_CRASHED, (0,))
    cluster.run()
    assert len(failures(cluster)) == 1
    own = cluster.status.runner(0).last_failure
    assert own is not None
    assert own.reason is Reason.PEER_LOST


def test_peer_lost_alone_waits_two_seconds_for_the_accused_rank() -> None:
    cluster = ready()
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    cluster.hear_all()
    made = cluster.reconcile()
    assert not cluster.status.history
    assert condition(cluster, ConditionType.RUNNER_FAILED).status == "True"
    assert made.requeue_at is not None
    assert made.requeue_at - cluster.now <= timedelta(seconds=2)
    assert not [a for a in made.actions if isinstance(a, SendTask)], "no task goes to a group that is failing"
    cluster.now = made.requeue_at
    assert see(cluster).reason is Reason.PEER_LOST


def test_better_evidence_replaces_the_cause_of_the_same_epoch() -> None:
    cluster = ready()
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    cluster.pods["tiny-1"].partitioned = True
    cluster.hear_all()
    cluster.lose_stream("tiny-1")
    cluster.reconcile()
    cluster.wait(7)
    assert see(cluster).reason is Reason.PEER_LOST
    assert cluster.status.restarts == 1
    cluster.lose_node("n2")
    assert see(cluster).reason is Reason.NODE_LOST
    assert len(cluster.status.history) == 1
    assert cluster.status.history[0].rank == 1
    assert cluster.status.restarts == 0, "a lost node is not the model's fault"
    assert len(failures(cluster)) == 1


def test_a_later_trouble_of_another_rank_does_not_replace_the_cause() -> None:
    cluster = ready(3)
    cluster.kill_container(1)
    see(cluster)
    cluster.supervisor(2).fail(Reason.ENGINE_CRASHED, "engine exited with code 1")
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, Reason.OUT_OF_MEMORY)


def test_a_later_and_stronger_trouble_of_another_rank_does_not_replace_a_crash() -> None:
    cluster = ready(3)
    cluster.kill_container(1, reason="Error")
    assert see(cluster).reason is Reason.CONTAINER_CRASHED
    cluster.supervisor(2).fail(Reason.ENGINE_CRASHED, "engine exited with code 1")
    assert see(cluster).rank == 1


def test_an_oom_kill_is_named_although_its_predecessor_had_reported_something_else() -> None:
    cluster = ready()
    cluster.supervisor(1).fail(Reason.LOAD_FAILED, "cannot allocate")
    cluster.kill_container(1)
    cluster._start_container(cluster.pods["tiny-1"])
    assert see(cluster).reason is Reason.OUT_OF_MEMORY


def test_a_failed_rank_stays_failed_when_its_engine_is_shut_down_afterwards() -> None:
    cluster = Cluster(restartPolicy={"maxRestarts": 0})
    cluster.run(until=lambda: "tiny-1" in cluster.pods and stuck(cluster, RunnerState.LOADING))
    cluster.wait(6)
    cluster.hear_all()
    cluster.reconcile()
    cluster.wait(620)
    assert see(cluster).reason is Reason.LOAD_TIMEOUT
    failed = cluster.status.history[0].rank
    assert failed is not None
    cluster.wait(6)
    cluster.tick()
    see(cluster)
    assert cluster.status.runner(failed).state is RunnerState.FAILED


def test_a_node_that_was_removed_counts_as_lost_once_its_pod_is_being_deleted() -> None:
    cluster = ready()
    cluster.lose_stream("tiny-1")
    del cluster.nodes["n2"]
    made = cluster.reconcile()
    assert not [a for a in made.actions if isinstance(a, DeletePod)], "news of a fresh node may still be due"
    cluster.delete("tiny-1")
    made = cluster.reconcile(act=False)
    assert [(a.name, a.grace_seconds) for a in made.actions if isinstance(a, DeletePod)] == [("tiny-1", 0)]
    assert cluster.status.history[0].reason is Reason.NODE_LOST


def test_an_oom_kill_of_the_whole_container_is_named_from_the_pod() -> None:
    cluster = ready(runner={"resources": {"limits": {"memory": "512Mi"}}})
    cluster.kill_container(1)
    failure = see(cluster)
    assert failure.reason is Reason.OUT_OF_MEMORY
    assert failure.message == (
        "rank 1/2 pod tiny-1 on node n2: container ended with exit code 137 (SIGKILL) in RunnerReady, OOMKilled, "
        "memory limit 512Mi"
    )


def test_a_killed_container_without_oom_is_told_as_observed_with_its_first_error_line() -> None:
    cluster = ready()
    log = "Traceback (most recent call last):\n  File x\nRuntimeError: no room\n"
    cluster.kill_container(1, reason="Error", message=log)
    failure = see(cluster)
    assert failure.reason is Reason.CONTAINER_CRASHED
    assert "exit code 137 (SIGKILL)" in failure.message
    assert failure.message.endswith("last words: RuntimeError: no room")


def test_a_successor_that_speaks_before_the_kubelet_is_a_failure_and_the_kubelets_word_improves_it() -> None:
    cluster = ready()
    status = cluster.pods["tiny-1"].manifest["status"]
    cluster.kill_container(1)
    ended = status["containerStatuses"][0].pop("state")
    cluster._start_container(cluster.pods["tiny-1"])
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, Reason.CONTAINER_CRASHED)
    assert "RunnerReady" in failure.message
    status["containerStatuses"][0]["lastState"] = ended
    assert see(cluster).reason is Reason.OUT_OF_MEMORY


def test_a_failure_that_the_predecessor_had_reported_is_kept() -> None:
    cluster = ready()
    cluster.supervisor(1).fail(Reason.LOAD_FAILED, "model.safetensors: missing tensor lm_head.weight")
    cluster.kill_container(1, reason="Error")
    cluster._start_container(cluster.pods["tiny-1"])
    assert see(cluster).reason is Reason.LOAD_FAILED


def test_a_deleted_pod_is_replaced_and_free_of_budget() -> None:
    cluster = ready()
    cluster.delete("tiny-1")
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, Reason.POD_DELETED)
    assert cluster.status.restarts == 0
    cluster.run()
    assert cluster.ready()
    assert cluster.created.count("tiny-1") == 2
    assert cluster.status.restarts == 0


def test_an_evicted_pod_is_named_so() -> None:
    cluster = ready()
    cluster.delete("tiny-1")
    disruption = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drain"}
    cluster.pods["tiny-1"].manifest["status"]["conditions"].append(disruption)
    failure = see(cluster)
    assert failure.reason is Reason.EVICTED
    assert "EvictionByEvictionAPI: drain" in failure.message


def test_a_lost_node_moves_its_rank_at_once_by_force_and_keeps_the_evidence() -> None:
    cluster = ready()
    cluster.lose_node("n2")
    made = cluster.reconcile(act=False)
    deletions = [a for a in made.actions if isinstance(a, DeletePod)]
    assert [(d.name, d.grace_seconds) for d in deletions] == [("tiny-1", 0)]
    assert cluster.status.history[0].reason is Reason.NODE_LOST
    cluster.run()
    assert cluster.ready()
    assert cluster.status.runner(1).node == "n1"
    failure = cluster.status.runner(1).last_failure
    assert failure is not None
    assert "node n2 is NotReady" in failure.message


def test_a_node_that_is_not_ready_while_its_supervisor_answers_costs_nothing() -> None:
    cluster = ready()
    cluster.nodes["n2"] = cluster.nodes["n2"].__class__("n2", False)
    made = cluster.reconcile()
    assert made.actions == ()
    assert cluster.ready()


def test_without_access_to_nodes_a_pod_left_behind_is_removed_by_force_when_its_time_is_long_over() -> None:
    cluster = ready()
    cluster.settings = cluster.settings.__class__(
        runner_image="runner:1", key_id="abcdef0123", started=START, watch_nodes=False
    )
    cluster.lose_stream("tiny-1")
    cluster.delete("tiny-1")
    made = cluster.reconcile()
    assert not [a for a in made.actions if isinstance(a, DeletePod)]
    cluster.wait(31)
    made = cluster.reconcile(act=False)
    assert [(a.name, a.grace_seconds) for a in made.actions if isinstance(a, DeletePod)] == [("tiny-1", 0)]


def test_a_silent_supervisor_fails_the_epoch_only_after_its_deadline() -> None:
    cluster = ready()
    cluster.pods["tiny-1"].partitioned = True
    cluster.lose_stream("tiny-1")
    made = cluster.reconcile()
    assert not cluster.status.history
    assert made.requeue_at is not None
    cluster.now = made.requeue_at
    cluster.hear_all()
    assert see(cluster).reason is Reason.RUNNER_UNREACHABLE


@pytest.mark.parametrize(
    ("state", "seconds", "reason"),
    [
        (RunnerState.CONNECTING, 50, Reason.CONNECT_TIMEOUT),
        (RunnerState.LOADING, 610, Reason.LOAD_TIMEOUT),
        (RunnerState.WARMING_UP, 310, Reason.WARMUP_TIMEOUT),
    ],
)
def test_a_missed_deadline_that_the_supervisor_does_not_end_fails_after_ten_seconds_more(
    state: RunnerState, seconds: int, reason: Reason
) -> None:
    cluster = Cluster()
    cluster.run(until=lambda: "tiny-1" in cluster.pods and stuck(cluster, state))
    cluster.wait(6)
    cluster.hear_all()
    cluster.reconcile()
    cluster.wait(seconds - 7)
    cluster.hear_all()
    cluster.reconcile()
    assert not cluster.status.history
    cluster.wait(8)
    assert see(cluster).reason is reason


def stuck(cluster: Cluster, state: RunnerState) -> bool:
    found = [pod.supervisor for pod in cluster.pods.values() if pod.supervisor is not None]
    if len(found) < 2 or found[1].report.state is not state:
        return False
    for supervisor in found:
        supervisor.running = None
    return True


def test_a_rank_that_fails_for_ever_spends_the_budget_and_leaves_everything_in_place() -> None:
    cluster = ready(restartPolicy={"maxRestarts": 2})
    for _ in range(3):
        cluster.kill_engine(1)
        cluster.run(until=lambda: cluster.stalled() or cluster.ready())
        cluster.run(30)
    assert cluster.stalled()
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


def test_the_budget_is_full_again_after_a_sustained_ready_and_that_alone_is_no_write() -> None:
    cluster = ready(restartPolicy={"maxRestarts": 1})
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.status.restarts == 1
    patches = len(cluster.patches)
    cluster.wait(601)
    cluster.hear_all()
    cluster.reconcile()
    assert len(cluster.patches) == patches
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
