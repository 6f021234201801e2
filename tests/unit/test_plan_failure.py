"""The failure of an epoch: one cause, recorded before anything is changed; then a new epoch in the same pods."""

from datetime import timedelta

import pytest

from mlx_operator.decide.actions import DeletePod, SendTask
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.tasks import CreateRunner, GroupCause
from tests.unit.scenes import condition, failures, ready, see
from tests.unit.simulator import START, Cluster


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


def test_the_next_epoch_is_told_why_the_last_one_failed() -> None:
    cluster = ready(3)
    cluster.supervisor(1).fail(Reason.ENGINE_CRASHED, "engine killed by signal 11 (SIGSEGV)", signal="SIGSEGV")
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 lost", peer=1)
    cluster.run()
    assert cluster.ready()
    created = {s.request.rank: s.request.task for s in cluster.sent if isinstance(s.request.task, CreateRunner)}
    assert set(created) == {0, 1, 2}
    expected = GroupCause(epoch=1, rank=1, reason=Reason.ENGINE_CRASHED, signal="SIGSEGV")
    for task in created.values():
        assert isinstance(task, CreateRunner)
        assert task.cause == expected


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


def test_a_frozen_supervisor_is_told_within_ten_seconds_by_default_and_not_before_its_deadline() -> None:
    cluster = ready()
    cluster.pods["tiny-1"].partitioned = True
    cluster.wait(5)
    cluster.lose_stream("tiny-1")
    cluster.reconcile()
    cluster.wait(2.5)
    cluster.reconcile()
    assert not cluster.status.history, "two heartbeats may get lost"
    cluster.wait(1)
    found = see(cluster)
    assert (found.rank, found.reason, found.consequences) == (1, Reason.RUNNER_UNREACHABLE, (0,))


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
    for _ in range(2):  # the first may still send a task that leads on, so that its step need not be written
        cluster.hear_all()
        cluster.reconcile()
    cluster.wait(seconds - 7)
    cluster.hear_all()
    cluster.reconcile()
    assert not cluster.status.history
    cluster.wait(8)
    assert see(cluster).reason is reason


def test_a_missed_deadline_says_how_long_was_waited_and_for_whom() -> None:
    cluster = Cluster(runners=3)
    cluster.run(until=lambda: "tiny-2" in cluster.pods and stuck(cluster, RunnerState.CONNECTING))
    cluster.supervisor(0).publish(waiting_for=(1, 2))
    cluster.wait(6)
    cluster.hear_all()
    cluster.reconcile()
    cluster.wait(60)
    failure = see(cluster)
    own = cluster.status.runner(0).last_failure
    assert failure.reason is Reason.CONNECT_TIMEOUT
    assert own is not None
    assert "not connected within 40 s (waiting for ranks 1, 2), and its supervisor did not end it" in own.message


def stuck(cluster: Cluster, state: RunnerState) -> bool:
    found = [pod.supervisor for pod in cluster.pods.values() if pod.supervisor is not None]
    if len(found) < 2 or found[1].report.state is not state:
        return False
    for supervisor in found:
        supervisor.running = None
    return True
