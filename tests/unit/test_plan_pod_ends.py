"""How a pod of a running group ends: evicted, preempted, drained, killed by a probe, stuck; and what is not claimed."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from mlx_operator_api.base import format_time
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.unit.scenes import condition, ready, see
from tests.unit.simulator import Cluster

PRESSURE = (
    "The node was low on resource: memory. Threshold quantity: 100Mi, available: 52Mi. Container runner was using "
    "1200Mi, request is 0, has larger consumption of memory. "
)
EMPTY_DIR = 'Usage of EmptyDir volume "cache" exceeds the limit "1Gi". '
PREEMPTED = "default-scheduler: preempting to accommodate a higher priority pod"
TAINTED = "Taint manager: deleting due to NoExecute taint"
KILLING = "Killing: Container runner failed liveness probe, will be restarted"
UNHEALTHY = (
    'Unhealthy: Liveness probe failed: Get "http://10.0.0.3:8081/healthz": context deadline exceeded '
    "(Client.Timeout exceeded while awaiting headers)"
)


def disrupted(cluster: Cluster, reason: str, message: str, rank: int = 1) -> None:
    """Somebody announces the end of a pod, which is then deleted."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
    cluster.pods[f"tiny-{rank}"].manifest["status"]["conditions"].append(condition)
    cluster.delete(f"tiny-{rank}")


def evicted(cluster: Cluster, message: str) -> None:
    """The kubelet ends a pod for the node's sake: it stays, Failed."""
    status = cluster.pods["tiny-1"].manifest["status"]
    status |= {"phase": "Failed", "reason": "Evicted", "message": message}
    cluster.lose_stream("tiny-1")


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        (PRESSURE, "set spec.runner.resources.requests.memory to what the shard needs"),
        ("The node was low on resource: ephemeral-storage. ", "free disk space on the node"),
        (EMPTY_DIR, "raise spec.cache.sizeLimit"),
        ("Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. ", "ephemeral-storage"),
    ],
)
def test_an_eviction_by_the_kubelet_is_told_in_its_words_with_what_helps(message: str, advice: str) -> None:
    cluster = ready()
    evicted(cluster, message)
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, Reason.EVICTED)
    assert f"its pod was evicted: Evicted, {message.strip(' .')}" in failure.message
    assert advice in condition(cluster, ConditionType.RUNNER_FAILED).message
    assert cluster.status.restarts == 0
    cluster.run(200)
    assert cluster.ready()


def test_a_preempted_pod_says_so_and_how_to_go_first() -> None:
    cluster = ready()
    disrupted(cluster, "PreemptionByScheduler", PREEMPTED)
    failure = see(cluster)
    assert failure.reason is Reason.EVICTED
    assert f"its pod was evicted: PreemptionByScheduler: {PREEMPTED}" in failure.message
    assert cluster.status.brief[-1].endswith("else set spec.runner.priorityClassName")


def test_a_drain_is_told_by_what_was_observed_the_eviction_and_the_cordon() -> None:
    cluster = ready()
    cluster.nodes["n2"] = replace(cluster.nodes["n2"], cordoned=True)
    disrupted(cluster, "EvictionByEvictionAPI", "Eviction API: evicting")
    failure = see(cluster)
    assert failure.message == (
        "rank 1/2 pod tiny-1 on node n2: its pod was evicted: EvictionByEvictionAPI: Eviction API: evicting, "
        "node n2 is cordoned"
    )
    assert cluster.status.brief[-1] == (
        "do: nothing: the group starts again on other nodes; when the work on the node is done: kubectl uncordon n2"
    )


def test_an_eviction_from_a_node_that_nobody_cordoned_claims_no_drain() -> None:
    cluster = ready()
    disrupted(cluster, "EvictionByEvictionAPI", "Eviction API: evicting")
    assert "cordoned" not in see(cluster).message


@pytest.mark.parametrize("heard", [True, False])
def test_a_taint_on_a_node_that_is_ready_is_no_lost_node(heard: bool) -> None:
    cluster = ready()
    disrupted(cluster, "DeletionByTaintManager", TAINTED)
    if not heard:
        cluster.lose_stream("tiny-1")
        cluster.pods["tiny-1"].partitioned = True
    failure = see(cluster)
    assert failure.reason is Reason.EVICTED
    assert failure.message.endswith(f"its pod was evicted: DeletionByTaintManager: {TAINTED}")


def test_a_taint_for_a_node_that_is_lost_is_told_as_its_loss() -> None:
    cluster = ready()
    cluster.lose_node("n2")
    disrupted(cluster, "DeletionByTaintManager", TAINTED)
    assert see(cluster).reason is Reason.NODE_LOST


def killed_by_probe(cluster: Cluster, *notes: str) -> None:
    cluster.kill_container(1, reason="Error")
    cluster.notes = {cluster.pods["tiny-1"].manifest["metadata"]["uid"]: notes}


def test_a_container_that_its_liveness_probe_ended_says_so() -> None:
    cluster = ready()
    killed_by_probe(cluster, KILLING, UNHEALTHY)
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, Reason.PROBE_FAILED)
    assert failure.message == (
        "rank 1/2 pod tiny-1 on node n2: container ended with exit code 137 (SIGKILL) in RunnerReady, ended by the "
        f"kubelet: {UNHEALTHY.partition(': ')[2]}"
    )
    assert cluster.status.restarts == 1
    cluster.run()
    assert cluster.ready()


def test_a_failing_probe_alone_is_not_what_ended_a_container() -> None:
    cluster = ready()
    killed_by_probe(cluster, UNHEALTHY)
    assert see(cluster).reason is Reason.CONTAINER_CRASHED


def test_an_oom_kill_goes_before_the_probe_that_failed_because_of_it() -> None:
    cluster = ready()
    killed_by_probe(cluster, KILLING, UNHEALTHY)
    cluster.pods["tiny-1"].manifest["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] = "OOMKilled"
    failure = see(cluster)
    assert failure.reason is Reason.OUT_OF_MEMORY
    assert "probe" not in failure.message


def test_the_probe_is_told_when_its_event_is_read_after_the_end_was_seen() -> None:
    cluster = ready()
    killed_by_probe(cluster)
    assert see(cluster).reason is Reason.CONTAINER_CRASHED
    cluster.notes = {cluster.pods["tiny-1"].manifest["metadata"]["uid"]: (KILLING, UNHEALTHY)}
    failure = see(cluster)
    assert failure.reason is Reason.PROBE_FAILED
    assert "exit code 137 (SIGKILL) in RunnerReady, ended by the kubelet: " in failure.message
    assert [e.reason for e in cluster.events if e.type == "Warning"] == [Reason.RUNNER_FAILED, Reason.PROBE_FAILED]


def test_the_kubelets_exit_code_completes_what_a_successor_was_heard_of_first() -> None:
    cluster = ready()
    status = cluster.pods["tiny-1"].manifest["status"]
    cluster.kill_container(1, reason="Error", message="RuntimeError: no room\n")
    ended = status["containerStatuses"][0].pop("state")
    cluster._start_container(cluster.pods["tiny-1"])
    assert see(cluster).message.endswith("container ended in RunnerReady")
    status["containerStatuses"][0]["lastState"] = ended
    failure = see(cluster)
    assert failure.message.endswith(
        "container ended with exit code 137 (SIGKILL) in RunnerReady, last words: RuntimeError: no room"
    )
    own = cluster.status.runner(1).last_failure
    assert own is not None
    assert (own.message, own.exit_code) == (failure.message, 137)
    assert [e.reason for e in cluster.events if e.type == "Warning"] == [Reason.RUNNER_FAILED]


def test_the_end_of_an_earlier_container_is_not_taken_for_that_of_the_one_after_it() -> None:
    cluster = ready()
    cluster.kill_container(1)
    assert see(cluster).reason is Reason.OUT_OF_MEMORY
    cluster.wait(10)
    cluster.run()
    assert cluster.ready()
    cluster.run(20)
    cluster.wait(20)
    # The next one is only heard of by its successor: the kubelet still shows the memory of before.
    pod = cluster.pods["tiny-1"]
    status = pod.manifest["status"]["containerStatuses"][0]
    before = dict(status)
    cluster.kill_container(1, reason="Error")
    cluster._start_container(pod)
    pod.manifest["status"]["containerStatuses"] = [before]
    failure = see(cluster)
    assert (failure.reason, failure.epoch) == (Reason.CONTAINER_CRASHED, 2)
    assert failure.message.endswith("container ended in RunnerReady")


def stuck(cluster: Cluster, **metadata: Any) -> None:
    cluster.delete("tiny-1")
    manifest = cluster.pods["tiny-1"].manifest
    manifest["metadata"] |= {"deletionTimestamp": format_time(cluster.now + timedelta(seconds=40)), **metadata}
    cluster.hear_all()
    cluster.reconcile()


@pytest.mark.parametrize(
    ("metadata", "words", "advice"),
    [
        ({}, "its kubelet does not confirm that its containers ended", "kubectl delete pod tiny-1 --force"),
        ({"finalizers": ["example.com/hold"]}, "held by the finalizer example.com/hold", "kubectl edit pod tiny-1"),
        ({"finalizers": ["a.b/c", "d.e/f"]}, "held by the finalizers a.b/c, d.e/f", "kubectl edit pod tiny-1"),
    ],
)
def test_a_pod_that_does_not_go_is_told_once_its_time_is_over(
    metadata: dict[str, Any], words: str, advice: str
) -> None:
    cluster = ready()
    stuck(cluster, **metadata)
    assert cluster.status.history[0].reason is Reason.POD_DELETED
    due = cluster.now + timedelta(seconds=70)
    cluster.wait(69)
    cluster.hear_all()
    made = cluster.reconcile()
    assert not cluster.stalled()
    assert made.requeue_at is not None
    assert made.requeue_at <= due
    cluster.wait(2)
    cluster.hear_all()
    cluster.reconcile()
    told = condition(cluster, ConditionType.STALLED)
    assert (told.status, told.reason) == ("True", Reason.POD_STUCK)
    assert "rank 1/2 pod tiny-1 on node n2: it is being deleted and should have been gone by 15:00:" in told.message
    assert words in told.message
    assert advice in told.message
    assert condition(cluster, ConditionType.RUNNER_FAILED).reason is Reason.POD_DELETED
    assert cluster.status.brief[0] == "Stalled: PodStuckTerminating after PodDeleted on rank 1"
    cluster._vanish("tiny-1")
    cluster.run()
    assert cluster.ready()


def test_a_pod_of_which_only_the_service_knows_that_it_is_not_ready_is_told() -> None:
    cluster = ready()
    pod = cluster.pods["tiny-0"].manifest
    not_ready = {"type": "Ready", "status": "False", "reason": "ContainersNotReady"}
    not_ready |= {"message": "containers with unready status: [runner]", "lastTransitionTime": format_time(cluster.now)}
    pod["status"]["conditions"] = [not_ready]
    cluster.hear_all()
    made = cluster.reconcile()
    assert condition(cluster, ConditionType.READY).reason is Reason.WAITING_FOR_ENDPOINT
    assert made.requeue_at == cluster.now.replace(microsecond=0) + timedelta(seconds=30)
    cluster.wait(31)
    cluster.hear_all()
    cluster.reconcile()
    told = condition(cluster, ConditionType.READY)
    assert (told.reason, cluster.stalled()) == (Reason.POD_NOT_READY, True)
    assert told.message == (
        "rank 0/2 pod tiny-0 on node n1: its runner is ready, but the pod is not Ready since 15:00:02Z: "
        "ContainersNotReady: containers with unready status: [runner]; see which probe or readiness gate fails, and "
        "why: kubectl describe pod tiny-0"
    )
    assert {r.state for r in cluster.status.runners} == {RunnerState.READY}
    assert not cluster.status.history, "nothing failed"
    cluster.run()
    assert cluster.ready()


def test_what_holds_up_a_restart_that_is_due_is_told_beside_the_failure_it_follows() -> None:
    cluster = ready()
    cluster.lose_node("n2")
    cluster.unplaceable = "0/2 nodes are available: 1 Insufficient memory."
    cluster.run(40)
    told = condition(cluster, ConditionType.READY)
    assert told.reason is Reason.UNSCHEDULABLE
    assert condition(cluster, ConditionType.RUNNER_FAILED).reason is Reason.NODE_LOST
    assert cluster.condition(ConditionType.RECONCILING) == "True"
    assert cluster.status.brief[0] == "Not ready: Unschedulable after NodeLost on rank 1"
    assert cluster.status.brief[-1] == "do: free or add memory on the nodes, or lower spec.runner.resources.requests"
    cluster.unplaceable = None
    cluster.run()
    assert cluster.ready()
