"""What keeps pods, runners or the model from getting on: a reason, the words of who said it, no flapping."""

from typing import Any

import pytest

from mlx_operator.decide.observed import Refusal, RunnerView
from mlx_operator.decide.pods import view
from mlx_operator_api import names
from mlx_operator_api.base import format_time
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState, TaskName
from tests.unit.scenes import condition, ready
from tests.unit.simulator import START, Cluster

WORDS = 'failed to pull and unpack image "runner:1": failed to resolve reference: connection refused'


def waiting(cluster: Cluster, reason: str, message: str = "", rank: int = 1, **more: Any) -> None:
    """The kubelet says why a container does not run."""
    status = cluster.pods[f"tiny-{rank}"].manifest["status"]
    entry = {"name": names.CONTAINER, "restartCount": 0, "state": {"waiting": {"reason": reason, "message": message}}}
    status["containerStatuses"] = [entry | more]


def placed(**spec: Any) -> Cluster:
    """Both pods have nodes; nothing runs yet."""
    cluster = Cluster(**spec)
    cluster.reconcile()
    cluster._schedule()
    cluster.reconcile()
    return cluster


def test_an_unschedulable_pod_is_told_in_the_schedulers_words_and_stalls_at_its_deadline() -> None:
    cluster = Cluster()
    cluster.unplaceable = "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."
    cluster.run(30)
    scheduled = condition(cluster, ConditionType.SCHEDULED)
    assert (scheduled.status, scheduled.reason) == ("False", Reason.UNSCHEDULABLE)
    assert scheduled.message == (
        "rank 0/2 pod tiny-0: not placed: 0/2 nodes are available: 2 node(s) didn't match Pod's node "
        "affinity/selector; the same on 2 ranks; correct spec.runner.nodeSelector or affinity, or label a node so that "
        "it matches"
    )
    assert condition(cluster, ConditionType.READY).reason is Reason.UNSCHEDULABLE
    assert not cluster.stalled()
    assert cluster.condition(ConditionType.RECONCILING) == "True"
    cluster.wait(600)
    cluster.reconcile()
    assert cluster.stalled()
    assert [e.reason for e in cluster.events].count(Reason.UNSCHEDULABLE) == 1
    cluster.unplaceable = None
    cluster.run()
    assert cluster.ready(), "recovery is automatic"
    assert cluster.status.epoch == 1


def test_a_pull_error_is_told_in_the_registrys_words_without_flapping() -> None:
    cluster = placed()
    waiting(cluster, "ErrImagePull", WORDS)
    cluster.reconcile()
    stalled = condition(cluster, ConditionType.STALLED)
    assert (stalled.status, stalled.reason) == ("True", Reason.IMAGE_PULL_FAILED)
    assert "connection refused; make the registry reachable" in stalled.message
    patches = len(cluster.patches)
    for message in (
        "",
        f'Back-off pulling image "runner:1": ErrImagePull: {WORDS}',
        'Back-off pulling image "runner:1"',
    ):
        cluster.wait(30)
        waiting(cluster, "ImagePullBackOff", message)
        cluster.reconcile()
        cluster.wait(30)
        waiting(cluster, "ErrImagePull", WORDS)
        cluster.reconcile()
    assert len(cluster.patches) == patches
    assert [e.reason for e in cluster.events].count(Reason.IMAGE_PULL_FAILED) == 1


def test_a_pull_error_of_all_ranks_stays_the_same_while_the_kubelet_has_no_words() -> None:
    cluster = placed()
    for rank in (0, 1):
        waiting(cluster, "ErrImagePull", WORDS, rank)
    cluster.reconcile()
    told = condition(cluster, ConditionType.STALLED).message
    assert told.startswith("rank 0/2 pod tiny-0 on node n1: ")
    assert told.count("the same on 2 ranks") == 1
    patches = len(cluster.patches)
    for silent in ((0, 1), (0,), (1,)):
        for rank in (0, 1):
            waiting(cluster, "ImagePullBackOff", "" if rank in silent else WORDS, rank)
        cluster.wait(30)
        cluster.reconcile()
        assert condition(cluster, ConditionType.STALLED).message == told
    assert len(cluster.patches) == patches


def test_a_model_image_that_cannot_be_pulled_points_at_the_source() -> None:
    cluster = Cluster(model={"source": "oci://registry.example/tiny:1"})
    cluster.reconcile()
    cluster._schedule()
    waiting(cluster, "ErrImagePull", 'failed to resolve reference "registry.example/tiny:1": not found')
    cluster.reconcile()
    assert "correct spec.model.source" in condition(cluster, ConditionType.STALLED).message


@pytest.mark.parametrize(
    ("words", "reason", "stalled"),
    [
        ('persistentvolumeclaim "models" not found', Reason.VOLUME_NOT_FOUND, True),
        (
            "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
            Reason.VOLUME_NOT_BOUND,
            False,
        ),
    ],
)
def test_a_claim_that_is_missing_stalls_and_one_that_is_being_bound_does_not(
    words: str, reason: Reason, stalled: bool
) -> None:
    cluster = Cluster()
    cluster.unplaceable = words
    cluster.run(30)
    assert condition(cluster, ConditionType.SCHEDULED).reason is reason
    assert cluster.stalled() == stalled
    cluster.unplaceable = None
    cluster.run()
    assert cluster.ready()


@pytest.mark.parametrize("reason", ["CreateContainerConfigError", "CreateContainerError", "RunContainerError"])
def test_a_container_that_cannot_start_is_told_in_the_kubelets_words(reason: str) -> None:
    cluster = placed()
    waiting(cluster, reason, 'secret "hf" not found')
    cluster.reconcile()
    stalled = condition(cluster, ConditionType.STALLED)
    assert stalled.reason is Reason.CONTAINER_START_ERROR
    assert f'rank 1/2 pod tiny-1 on node n2: {reason}: secret "hf" not found' in stalled.message


def test_a_volume_that_does_not_mount_is_told_from_the_pods_events_and_stalls_after_a_while() -> None:
    cluster = placed()
    waiting(cluster, "ContainerCreating")
    note = 'MountVolume.SetUp failed for volume "model": rpc error: not found'
    uid = cluster.pods["tiny-1"].manifest["metadata"]["uid"]
    cluster.notes = {uid: (note,)}
    cluster.reconcile()
    assert condition(cluster, ConditionType.SCHEDULED).reason is Reason.CONTAINER_START_ERROR
    assert note in condition(cluster, ConditionType.SCHEDULED).message
    assert not cluster.stalled()
    cluster.wait(31)
    cluster.reconcile()
    assert cluster.stalled()


def test_a_container_that_never_starts_ends_at_the_pull_deadline() -> None:
    cluster = placed()
    waiting(cluster, "ContainerCreating", rank=0)
    waiting(cluster, "ContainerCreating")
    cluster.wait(599)
    cluster.reconcile()
    assert not cluster.stalled()
    cluster.wait(2)
    cluster.reconcile()
    assert condition(cluster, ConditionType.STALLED).reason is Reason.PULL_TIMEOUT


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (403, 'pods "tiny-0" is forbidden: exceeded quota: small', Reason.POD_REFUSED),
        (403, 'violates PodSecurity "restricted:latest"', Reason.POD_REFUSED),
        (422, 'Pod "tiny-0" is invalid: spec.volumes[0]: Forbidden', Reason.POD_REFUSED),
        (409, "Pod tiny-0 exists and belongs to nobody", Reason.CHILD_CONFLICT),
    ],
)
def test_a_refused_pod_is_told_in_the_api_servers_words(status: int, message: str, reason: Reason) -> None:
    cluster = Cluster()
    cluster.refuse = Refusal(status, message, START)
    cluster.reconcile()
    cluster.reconcile()
    stalled = condition(cluster, ConditionType.STALLED)
    assert (stalled.status, stalled.reason) == ("True", reason)
    assert (f"HTTP {status}): {message}" if status != 409 else f"tiny-0: {message}; ") in stalled.message
    cluster.refuse = None
    cluster.run()
    assert cluster.ready()


def test_a_pod_without_our_label_is_told_with_the_command_that_puts_it_back() -> None:
    cluster = Cluster(runners=1)
    words = "Pod tiny-0 of this ModelInstance exists and lacks the label mlx-operator.dev/instance=tiny"
    cluster.refuse = Refusal(409, words, START)
    cluster.reconcile()
    cluster.reconcile()
    assert condition(cluster, ConditionType.STALLED).message.endswith(
        f"{words}; put the label back, or delete the pod: "
        "kubectl label --overwrite pod tiny-0 mlx-operator.dev/instance=tiny"
    )
    assert cluster.status.brief[-1].startswith("do: put the label back")


def test_a_server_without_image_volumes_is_named() -> None:
    cluster = Cluster(model={"source": "oci://m:1"})
    cluster.refuse = Refusal(422, "spec.volumes[4]: Required value: must specify a volume type", START)
    cluster.reconcile()
    cluster.reconcile()
    assert condition(cluster, ConditionType.STALLED).reason is Reason.IMAGE_VOLUME_UNSUPPORTED


def crash(cluster: Cluster, restarts: int, running: bool) -> None:
    ended = {"exitCode": 1, "reason": "Error", "message": "ImportError: no module named mlx\n"}
    state: dict[str, Any] = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
    if running:
        state = {"running": {"startedAt": format_time(cluster.now)}}
    status = cluster.pods["tiny-1"].manifest["status"]
    entry = {"name": names.CONTAINER, "restartCount": restarts, "state": state, "lastState": {"terminated": ended}}
    status |= {"phase": "Running", "podIP": "10.0.0.9", "containerStatuses": [entry]}


def test_a_container_that_crashes_before_it_joins_is_told_once_through_all_its_restarts() -> None:
    cluster = placed()
    crash(cluster, 1, running=False)
    cluster.reconcile()
    scheduled = condition(cluster, ConditionType.SCHEDULED)
    assert scheduled.reason is Reason.CONTAINER_CRASHED
    assert "exit code 1" in scheduled.message
    assert "ImportError: no module named mlx" in scheduled.message
    assert not cluster.stalled()
    crash(cluster, 2, running=False)
    cluster.reconcile()
    assert cluster.stalled()
    patches = len(cluster.patches)
    for restarts in range(3, 9):
        for running in (True, False):
            cluster.wait(20)
            crash(cluster, restarts, running)
            cluster.reconcile()
    assert len(cluster.patches) == patches
    assert cluster.created == ["tiny-0", "tiny-1"], "the kubelet's back-off is left to the kubelet"


def test_a_supervisor_that_nobody_can_reach_is_told_with_the_error() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: bool(cluster.pods) and cluster.pods["tiny-1"].supervisor is not None)
    pod = cluster.pods["tiny-1"]
    pod.partitioned = True
    uid = pod.manifest["metadata"]["uid"]
    cluster.views[uid] = RunnerView(error="connect to 10.0.0.3:8081 timed out")
    cluster.run(15)
    assert not cluster.stalled()
    cluster.wait(15)
    cluster.hear_all()
    cluster.reconcile()
    stalled = condition(cluster, ConditionType.STALLED)
    assert stalled.reason is Reason.RUNNER_UNREACHABLE
    assert "timed out" in stalled.message
    assert "8081" in stalled.message
    pod.partitioned = False
    cluster.run()
    assert cluster.ready()


def test_a_report_that_cannot_be_decoded_is_told_and_costs_no_runner() -> None:
    cluster = Cluster()
    cluster.run()
    uid = cluster.pods["tiny-1"].manifest["metadata"]["uid"]
    known = cluster.views[uid]
    cluster.views[uid] = RunnerView(known.report, cluster.now, True, "report cannot be decoded: state", True)
    made = cluster.reconcile()
    assert made.actions == ()
    assert condition(cluster, ConditionType.READY).reason is Reason.REPORT_UNDECODABLE
    assert "report cannot be decoded: state" in condition(cluster, ConditionType.READY).message
    assert not cluster.status.history
    cluster.run()
    assert cluster.ready()


def test_a_runner_of_another_protocol_gets_no_task() -> None:
    cluster = placed()
    cluster.tick()
    cluster.supervisor(1).publish(protocol=9)
    cluster.hear_all()
    cluster.reconcile()
    assert cluster.sent == []
    assert condition(cluster, ConditionType.STALLED).reason is Reason.PROTOCOL_MISMATCH


@pytest.mark.parametrize("reason", [Reason.MODEL_NOT_FOUND, Reason.NO_SPACE, Reason.MODEL_UNREACHABLE])
def test_a_failed_download_stalls_costs_nothing_and_is_tried_again_every_five_minutes(reason: Reason) -> None:
    cluster = Cluster()
    cluster.run(until=lambda: len([p for p in cluster.pods.values() if p.supervisor]) == 2)
    for rank in (0, 1):
        cluster.supervisor(rank).download_fails = reason
    cluster.run(30)
    assert cluster.stalled()
    available = condition(cluster, ConditionType.MODEL_AVAILABLE)
    assert (available.status, available.reason) == ("False", reason)
    assert "DownloadModel failed: no config.json at /models/source" in available.message
    assert {r.state for r in cluster.status.runners} == {RunnerState.IDLE}
    assert (cluster.status.epoch, cluster.status.restarts, cluster.status.history) == (1, 0, ())
    patches = len(cluster.patches)
    cluster.run(1000)
    attempts = [s.request.attempt for s in cluster.sent if s.request.task.name is TaskName.DOWNLOAD_MODEL]
    assert max(attempts) == 4
    assert len(cluster.patches) == patches, "a retry that fails the same way writes nothing"
    for rank in (0, 1):
        cluster.supervisor(rank).download_fails = None
    cluster.run(400)
    assert cluster.ready()
    assert cluster.status.epoch == 1


def test_a_download_that_failed_shows_no_progress_and_when_it_is_tried_again() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: len([p for p in cluster.pods.values() if p.supervisor]) == 2)
    cluster.supervisor(0).publish(download_percent=40)
    cluster.supervisor(0).download_fails = Reason.MODEL_UNREACHABLE
    cluster.run(30)
    assert cluster.status.runners[0].progress is None
    assert "; tried again every 5 minutes; " in condition(cluster, ConditionType.MODEL_AVAILABLE).message


def test_a_failure_that_stalls_is_named_once() -> None:
    cluster = ready(restartPolicy={"backoff": {"initial": "1h"}})
    cluster.kill_engine(0)
    cluster.run(20)
    cluster.pods["tiny-1"].partitioned = True
    cluster.lose_stream("tiny-1")
    cluster.wait(30)
    cluster.hear_all()
    cluster.reconcile()
    assert condition(cluster, ConditionType.STALLED).reason is Reason.RUNNER_UNREACHABLE
    assert cluster.status.brief[0] == "Stalled: RunnerUnreachable on rank 1"


def test_a_corrupt_model_is_not_tried_again_before_somebody_asks() -> None:
    cluster = Cluster(runners=1)
    cluster.run(until=lambda: bool(cluster.pods) and cluster.pods["tiny-0"].supervisor is not None)
    cluster.supervisor(0).download_fails = Reason.MODEL_CORRUPT
    cluster.run(10_000)
    assert cluster.stalled()
    attempts = {s.request.attempt for s in cluster.sent if s.request.task.name is TaskName.DOWNLOAD_MODEL}
    assert attempts == {1}
    cluster.supervisor(0).download_fails = None
    cluster.annotate(names.RETRY_ANNOTATION, "replaced")
    cluster.run()
    assert cluster.ready()


def test_a_restarted_operator_keeps_what_it_cannot_see_yet_of_a_failed_download() -> None:
    cluster = Cluster(runners=1)
    cluster.run(until=lambda: bool(cluster.pods) and cluster.pods["tiny-0"].supervisor is not None)
    cluster.supervisor(0).download_fails = Reason.MODEL_NOT_FOUND
    cluster.run(30)
    patches = len(cluster.patches)
    cluster.restart_operator()
    cluster.reconcile()
    cluster.hear_all()
    cluster.reconcile()
    assert len(cluster.patches) == patches


def test_a_pod_without_status_is_read_as_pending() -> None:
    found = view({"metadata": {"name": "a", "uid": "b"}})
    assert (found.phase, found.runs, found.scheduled, found.container.running) == ("Pending", False, False, None)


def test_ipv6_addresses_are_passed_over_because_the_ring_speaks_only_ipv4() -> None:
    status = {"podIP": "fd00::1", "podIPs": [{"ip": "fd00::1"}, {"ip": "10.0.0.1"}]}
    assert view({"metadata": {"name": "a", "uid": "b"}, "status": status}).ip == "10.0.0.1"
