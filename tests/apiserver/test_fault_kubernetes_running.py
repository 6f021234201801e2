"""What Kubernetes does to the pods of a group that runs: named for what it was, and the group starts again."""

# ruff: noqa: E501 (the texts are compared word by word)
import os
import signal
import time
from typing import Any

from mlx_operator.act.resources import INSTANCES, PODS
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.apiserver import injection
from tests.apiserver.faulting import LONG, failed_before, seen
from tests.apiserver.harness import Manifest, World, condition, is_ready
from tests.faults import Fault, Layer, fault

WHO = "rank 1/2 pod tiny-1 on node n2: "
FREE = "; restart (free of budget) at …Z; "
LATER = "; restart 2/5 at …Z; "
PRESSURE = (
    "The node was low on resource: memory. Threshold quantity: 100Mi, available: 52400Ki. Container runner was using "
    "1200Mi, request is 0, has larger consumption of memory"
)
PREEMPTING = "default-scheduler: preempting to accommodate a higher priority pod"
TAINTED = "Taint manager: deleting due to NoExecute taint"
PROBE = (
    'Liveness probe failed: Get "http://10.244.1.7:8081/healthz": context deadline exceeded (Client.Timeout exceeded '
    "while awaiting headers)"
)


def row(name: str, what: str, injected: str, reason: Reason, says: str, **more: Any) -> Fault:
    return Fault(
        id=f"kube-{name}",
        what=what,
        injected=injected,
        layer=Layer.OPERATOR,
        reason=reason,
        says=says,
        **{"state": RunnerState.READY, "within": 3.0, **more},
    )


async def serving(place: World, *flags: str, **spec: Any) -> None:
    """A group that is Ready and whose next restart is far off."""
    await place.operator(*flags)
    await place.create(restartPolicy=LONG, **spec)
    await failed_before(place)
    await place.until_ready()


async def goes_on(place: World) -> Manifest:
    """What holds the new pod is over, and so is the back-off: Ready again in the next epoch, evidence kept."""
    injection.released(place)
    await place.kubelet.place_all()
    instance = await place.get()
    if "nextRestartAt" in instance["status"]:
        over = {"status": {"nextRestartAt": instance["metadata"]["creationTimestamp"]}}
        await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", over, subresource="status")
    after = await place.until(lambda i: is_ready(i) and i["status"]["epoch"] > 1, "Ready again")
    assert after["status"]["history"], "the failure stays readable"
    assert after["status"]["runners"][1]["lastFailure"]["message"] == after["status"]["history"][0]["message"]
    assert condition(after, ConditionType.RUNNER_FAILED)["reason"] == Reason.RECOVERED
    return after


@fault(
    row(
        "oom",
        "the kernel kills the whole container for memory (cgroup v2)",
        "SIGKILL of rank 1's supervisor and engine; the kubelet says OOMKilled",
        Reason.OUT_OF_MEMORY,
        f"{WHO}container ended with exit code 137 (SIGKILL) in RunnerReady, OOMKilled, memory limit 512Mi{LATER}raise "
        "spec.runner.resources.limits.memory, use more runners, or a smaller model",
    ),
    row(
        "container-restart",
        "container restarted under us",
        "SIGKILL of rank 1's supervisor and engine; the kubelet starts it again",
        Reason.CONTAINER_CRASHED,
        f"{WHO}container ended with exit code 137 (SIGKILL) in RunnerReady{LATER}read the previous container's log: "
        "kubectl logs tiny-1 --previous",
    ),
)
async def test_a_container_that_ends_is_told_by_how_it_ended(place: World, row: Fault) -> None:
    await serving(place, runner={"resources": {"limits": {"memory": "512Mi"}}})
    began = time.monotonic()
    place.kubelet.kill("tiny-1", reason="OOMKilled" if row.reason is Reason.OUT_OF_MEMORY else "")
    instance = await seen(place, row, since=began)
    assert instance["status"]["restarts"] == 2
    await goes_on(place)


@fault(
    row(
        "liveness",
        "liveness probe fails",
        "rank 1's supervisor stopped (SIGSTOP); the kubelet's Events, then its SIGKILL",
        Reason.PROBE_FAILED,
        f"{WHO}container ended with exit code 137 (SIGKILL) in RunnerReady, ended by the kubelet: {PROBE}{LATER}look at "
        "the load and the memory of the node; the log of the container before: kubectl logs tiny-1 --previous",
        within=15.0,
    )
)
async def test_a_liveness_probe_that_fails_is_told_from_the_kubelets_events(place: World, row: Fault) -> None:
    await serving(place, deadlines={"unreachable": "2m"})
    injection.freeze(place, "tiny-1")
    began = time.monotonic()
    place.kubelet.kill("tiny-1")
    # The Events are read a moment after the end of the container was seen; here always after it was told.
    await place.until(
        lambda i: i["status"].get("history", [{}])[0].get("rank") == 1, "the end of the container is told"
    )
    await injection.says(place, "tiny-1", "Unhealthy", PROBE)
    killing = "Container runner failed liveness probe, will be restarted"
    await injection.says(place, "tiny-1", "Killing", killing, "Normal")
    await seen(place, row, since=began)
    await goes_on(place)


@fault(
    row(
        "evicted",
        "pod evicted by its kubelet",
        "phase Failed, reason Evicted, and the condition DisruptionTarget, as under memory pressure",
        Reason.EVICTED,
        f"{WHO}its pod was evicted: TerminationByKubelet: {PRESSURE}{FREE}set spec.runner.resources.requests.memory to "
        "what the shard needs, so that other pods are evicted first",
    ),
    row(
        "preempted",
        "pod preempted",
        "the scheduler's condition DisruptionTarget, then the deletion",
        Reason.EVICTED,
        f"{WHO}its pod was evicted: PreemptionByScheduler: {PREEMPTING}{FREE}nothing, if that pod may go first and there "
        "is room elsewhere; else set spec.runner.priorityClassName",
    ),
    row(
        "tainted",
        "node tainted NoExecute",
        "the taint manager's condition DisruptionTarget, then the deletion; the node stays Ready",
        Reason.EVICTED,
        f"{WHO}its pod was evicted: DeletionByTaintManager: {TAINTED}{FREE}nothing, once a node without that taint has "
        "room; spec.runner.tolerations lets pods stay",
    ),
    row(
        "drained",
        "node drained",
        "`kubectl drain n2`: the real one, through the Eviction API",
        Reason.EVICTED,
        f"{WHO}its pod was evicted: EvictionByEvictionAPI: Eviction API: evicting, node n2 is cordoned{FREE}nothing: the "
        "group starts again on other nodes; when the work on the node is done: kubectl uncordon n2",
    ),
    row(
        "pod-deleted",
        "pod deleted by somebody",
        "`kubectl delete pod tiny-1`",
        Reason.POD_DELETED,
        f"{WHO}its pod is being deleted{FREE}nothing: a new pod is made and the group starts again",
    ),
)
async def test_a_pod_that_somebody_ends_is_told_by_who_did_it_and_costs_no_budget(place: World, row: Fault) -> None:
    await serving(place)
    injection.held(place, "ContainerCreating", "", "tiny-1")
    began = time.monotonic()
    if row.id == "kube-evicted":
        place.kubelet.of("tiny-1").over = True
        place.kubelet.kill("tiny-1")
        await injection.fails(place, "tiny-0")
        await place.kubelet.evict("tiny-1", f"{PRESSURE}. ")
    elif row.id == "kube-preempted":
        await place.kubelet.disrupt("tiny-1", "PreemptionByScheduler", PREEMPTING)
    elif row.id == "kube-tainted":
        await place.kubelet.disrupt("tiny-1", "DeletionByTaintManager", TAINTED)
    elif row.id == "kube-drained":
        await injection.kubectl(place, "drain", "n2", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s")
    else:
        await injection.kubectl(place, "delete", "pod", "tiny-1", "-n", place.namespace, "--wait=false")
    instance = await seen(place, row, since=began)
    assert instance["status"]["restarts"] == 1, "as before"
    if row.id == "kube-drained":
        await injection.kubectl(place, "uncordon", "n2")
    await goes_on(place)


@fault(
    row(
        "node-lost",
        "node lost",
        "rank 1's supervisor stopped, its node NotReady; no other node has room",
        Reason.NODE_LOST,
        f"{WHO}node n2 is NotReady since …Z (NodeStatusUnknown){FREE}nothing for the group, which moves to other nodes; "
        "look at the node: kubectl describe node n2",
        within=6.0,
        then="by itself, once a node has room",
    )
)
async def test_a_lost_node_is_told_before_the_trouble_of_its_pods(place: World, row: Fault) -> None:
    await serving(place, deadlines={"unreachable": "3s"})
    place.kubelet.unplaceable = (
        "0/2 nodes are available: 1 Insufficient memory, 1 node(s) had untolerated taint(s). preemption: 0/2 nodes are "
        "available: 2 Preemption is not helpful for scheduling."
    )
    began = time.monotonic()
    frozen = injection.freeze(place, "tiny-1")
    await place.kubelet.set_node("n2", ready=False)
    try:
        instance = await seen(place, row, since=began)
        assert condition(instance, ConditionType.READY)["reason"] == Reason.UNSCHEDULABLE
        assert [failure["reason"] for failure in instance["status"]["history"]] == [Reason.NODE_LOST]
    finally:
        await place.kubelet.set_node("n2", ready=True)
        if any(c.process is not None and c.process.pid == frozen for c in place.kubelet.containers.values()):
            os.kill(frozen, signal.SIGCONT)
    await goes_on(place)


@fault(
    row(
        "pod-stuck",
        "pod stuck terminating",
        "a finalizer on rank 1's pod, which is then deleted",
        Reason.POD_STUCK,
        f"{WHO}it is being deleted and should have been gone by …Z: held by the finalizer example.com/hold; let the "
        "controller of that finalizer finish; if it is gone for good, remove it: kubectl edit pod tiny-1",
        condition=ConditionType.STALLED,
        within=75.0,
        then="the user: removes what holds it",
    )
)
async def test_a_pod_that_does_not_go_is_told_with_what_holds_it(place: World, row: Fault) -> None:
    await serving(place)
    hold = {"metadata": {"finalizers": ["example.com/hold"]}}
    await place.kube.merge_patch(PODS, place.namespace, "tiny-1", hold)
    began = time.monotonic()
    await injection.delete(place, "tiny-1")
    instance = await seen(place, row, since=began)
    assert condition(instance, ConditionType.RUNNER_FAILED)["reason"] == Reason.POD_DELETED
    await place.kube.merge_patch(PODS, place.namespace, "tiny-1", {"metadata": {"finalizers": None}})
    await goes_on(place)


@fault(
    row(
        "readiness",
        "readiness probe of rank 0 fails although its runner is ready",
        "the kubelet's condition Ready=False of rank 0's pod",
        Reason.POD_NOT_READY,
        "rank 0/2 pod tiny-0 on node n1: its runner is ready, but the pod is not Ready since …Z: ContainersNotReady: "
        "containers with unready status: [runner]; see which probe or readiness gate fails, and why: kubectl describe "
        "pod tiny-0",
        condition=ConditionType.READY,
        state=None,
        rank=0,
        within=35.0,
    )
)
async def test_an_endpoint_that_is_not_ready_is_told_though_no_runner_failed(place: World, row: Fault) -> None:
    await serving(place)
    began = time.monotonic()
    place.kubelet.unready.add("tiny-0")
    instance = await seen(place, row, since=began)
    assert "history" not in instance["status"]
    assert {runner["state"] for runner in instance["status"]["runners"]} == {RunnerState.READY}
    place.kubelet.unready.clear()
    instance = await place.until_ready()
    assert instance["status"]["epoch"] == 1
