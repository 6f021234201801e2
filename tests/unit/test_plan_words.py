"""What a person reads: `status.brief` for every row of the fault matrix, word by word."""

# ruff: noqa: E501 (the texts are compared word by word)
from collections.abc import Callable
from itertools import pairwise

import pytest

from mlx_operator.decide.observed import Refusal
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import MAX_MESSAGE, LastFailure
from tests.unit.scenes import condition, ready, see
from tests.unit.simulator import START, Cluster
from tests.unit.test_plan_problems import WORDS, crash, placed, waiting
from tests.unit.test_plan_startup import until


def before_the_pods() -> Cluster:
    cluster = Cluster()
    cluster.reconcile()
    return cluster


def serving() -> Cluster:
    return ready()


def loading_for_a_minute() -> Cluster:
    cluster = Cluster(deadlines={"load": "2h"})
    until(cluster, 0, RunnerState.LOADING)
    for rank in (0, 1):
        cluster.supervisor(rank).running = None
    cluster.supervisor(0).publish(layers="12-23", layers_loaded=7, layers_total=12)
    cluster.hear_all()
    cluster.reconcile()
    cluster.wait(70)
    cluster.hear_all()
    cluster.reconcile()
    return cluster


def engine_killed() -> Cluster:
    cluster = ready()
    cluster.kill_engine(1)
    see(cluster)
    return cluster


def engine_killed_and_recovered() -> Cluster:
    cluster = ready()
    cluster.kill_engine(1)
    cluster.run()
    return cluster


def peer_lost_and_nothing_else_known() -> Cluster:
    cluster = ready()
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    cluster.hear_all()
    cluster.reconcile()
    return cluster


def container_out_of_memory() -> Cluster:
    cluster = ready(runner={"resources": {"limits": {"memory": "512Mi"}}})
    cluster.kill_container(1)
    see(cluster)
    return cluster


def pod_deleted() -> Cluster:
    cluster = ready()
    cluster.delete("tiny-1")
    see(cluster)
    return cluster


def node_lost() -> Cluster:
    cluster = ready()
    cluster.lose_node("n2")
    see(cluster)
    return cluster


def supervisor_silent() -> Cluster:
    cluster = ready()
    cluster.pods["tiny-1"].partitioned = True
    cluster.lose_stream("tiny-1")
    cluster.wait(16)
    see(cluster)
    return cluster


def budget_spent() -> Cluster:
    cluster = ready(restartPolicy={"maxRestarts": 0})
    cluster.kill_engine(0)
    cluster.run()
    return cluster


def hopeless() -> Cluster:
    cluster = ready()
    words = "the shard needs 1.1Gi and the memory limit is 512Mi"
    cluster.supervisor(1).fail(Reason.INSUFFICIENT_MEMORY, words)
    cluster.run()
    return cluster


def suspended() -> Cluster:
    cluster = ready()
    cluster.change(suspend=True)
    cluster.run()
    return cluster


def unschedulable() -> Cluster:
    cluster = Cluster()
    cluster.unplaceable = "0/2 nodes are available: 2 Insufficient memory."
    cluster.run(30)
    return cluster


def image_not_pulled() -> Cluster:
    cluster = placed()
    waiting(cluster, "ErrImagePull", WORDS)
    cluster.reconcile()
    return cluster


def quota_exceeded() -> Cluster:
    cluster = Cluster()
    cluster.refuse = Refusal(403, 'pods "tiny-0" is forbidden: exceeded quota: small', START)
    cluster.reconcile()
    cluster.reconcile()
    return cluster


def crash_before_joining() -> Cluster:
    cluster = placed()
    crash(cluster, 2, running=False)
    cluster.reconcile()
    return cluster


def model_not_found() -> Cluster:
    cluster = placed()
    cluster.tick()
    for rank in (0, 1):
        cluster.supervisor(rank).download_fails = Reason.MODEL_NOT_FOUND
    cluster.run(30)
    return cluster


def downloading() -> Cluster:
    cluster = Cluster(model={"source": "hf://Qwen/Qwen2.5-0.5B-Instruct"})
    cluster.run(until=lambda: bool(cluster.status.model and cluster.status.model.revision))
    for rank, percent in ((0, 47), (1, 52)):
        trouble = "model-00001-of-00002.safetensors: HTTP 503" if rank else None
        cluster.supervisor(rank).running = None
        cluster.supervisor(rank).publish(
            download_percent=percent, download_bytes=1_200_000_000, download_trouble=trouble
        )
    cluster.wait(70)
    cluster.hear_all()
    cluster.reconcile()
    return cluster


def token_refused() -> Cluster:
    cluster = Cluster(model={"source": "hf://org/gated"})
    cluster.run(until=lambda: len(list(cluster.supervisors())) == 2)
    cluster.supervisor(0).download_fails = Reason.MODEL_UNAUTHORIZED
    cluster.supervisor(0).download_words = "hf://org/gated@main: org/gated is gated (HTTP 403 for org/gated)"
    cluster.run(30)
    return cluster


def spec_not_valid() -> Cluster:
    cluster = ready()
    cluster.change(runners=65)
    cluster.run()
    return cluster


EXPECTED: dict[Callable[[], Cluster], str] = {
    before_the_pods: """
        Not ready: 0/2 pods run; rank 0/2 pod tiny-0 is being created
        rank 0/2 tiny-0: RunnerPending
        rank 1/2 tiny-1: RunnerPending
    """,
    serving: """
        Ready: 2/2 runners serve tiny at http://tiny.default.svc:8080/v1
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11
        rank 1/2 tiny-1 on n2: RunnerReady, layers 0-11
    """,
    loading_for_a_minute: """
        Not ready: 0/2 runners hold their shard; waiting for rank 0 on node n1 (6/12 layers) and 1 other
        rank 0/2 tiny-0 on n1: RunnerLoading, layers 12-23, 6/12 layers
        rank 1/2 tiny-1 on n2: RunnerLoading
    """,
    engine_killed: """
        Not ready: restart 1/5 at 15:00:02Z after EngineCrashed on rank 1
        rank 1/2 tiny-1 on n2: RunnerFailed, engine killed by signal 9 (SIGKILL) in RunnerReady
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11
        do: read the evidence in the message and the log: kubectl logs tiny-1
    """,
    engine_killed_and_recovered: """
        Ready: 2/2 runners serve tiny at http://tiny.default.svc:8080/v1
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11, last failure PeerLost in epoch 1
        rank 1/2 tiny-1 on n2: RunnerReady, layers 0-11, last failure EngineCrashed in epoch 1
    """,
    peer_lost_and_nothing_else_known: """
        Not ready: a failure is being looked into
        rank 0/2 tiny-0 on n1: RunnerFailed, connection to rank 1 was lost in RunnerReady
        rank 1/2 tiny-1 on n2: RunnerReady, layers 0-11
        do: look at the rank that the message accuses
    """,
    container_out_of_memory: """
        Not ready: restart 1/5 at 15:00:02Z after OutOfMemory on rank 1
        rank 1/2 tiny-1 on n2: RunnerFailed, container ended with exit code 137 (SIGKILL) in RunnerReady, OOMKilled, memory limit 512Mi
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11
        do: raise spec.runner.resources.limits.memory, use more runners, or a smaller model
    """,
    pod_deleted: """
        Not ready: restart (free of budget) at 15:00:02Z after PodDeleted on rank 1
        rank 1/2 tiny-1 on n2: RunnerFailed, its pod is being deleted
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11
        do: nothing: a new pod is made and the group starts again
    """,
    node_lost: """
        Not ready: restart (free of budget) at 15:00:02Z after NodeLost on rank 1
        rank 1/2 tiny-1 on n2: RunnerFailed, node n2 is NotReady since 15:00:02Z (NodeStatusUnknown)
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11
        do: nothing for the group, which moves to other nodes; look at the node: kubectl describe node n2
    """,
    supervisor_silent: """
        Not ready: restart 1/5 at 15:00:18Z after RunnerUnreachable on rank 1
        rank 1/2 tiny-1 on n2: RunnerFailed, its supervisor cannot be reached, silent since 15:00:02Z: connection lost
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11
        do: where there is no connection, check NetworkPolicies between the operator and the pods (port 8081), else the pod and its node: kubectl describe pod tiny-1
    """,
    budget_spent: """
        Stalled: RestartBudgetExhausted after EngineCrashed on rank 0
        rank 0/2 tiny-0 on n1: RunnerFailed, engine killed by signal 9 (SIGKILL) in RunnerReady
        rank 1/2 tiny-1 on n2: RunnerFailed (consequence), connection to rank 0 was lost in RunnerReady
        do: read the evidence in the message and the log: kubectl logs tiny-0
        do: see the last failure; correct the spec, or set the annotation mlx-operator.dev/retry to a new value
    """,
    hopeless: """
        Stalled: InsufficientMemory on rank 1
        rank 1/2 tiny-1 on n2: RunnerFailed, the shard needs 1.1Gi and the memory limit is 512Mi in RunnerReady
        rank 0/2 tiny-0 on n1: RunnerFailed (consequence), connection to rank 1 was lost in RunnerReady
        do: raise spec.runner.resources.limits.memory or spec.runners
    """,
    suspended: """
        Suspended: spec.suspend is true: pods are removed; Service and history are kept; set it to false to start again
        rank 0/2 tiny-0: RunnerPending
        rank 1/2 tiny-1: RunnerPending
        do: set spec.suspend to false to start it again
    """,
    unschedulable: """
        Not ready: Unschedulable
        why: rank 0/2 pod tiny-0: not placed: 0/2 nodes are available: 2 Insufficient memory; the same on 2 ranks
        rank 0/2 tiny-0: RunnerPending
        rank 1/2 tiny-1: RunnerPending
        do: free or add memory on the nodes, or lower spec.runner.resources.requests
    """,
    image_not_pulled: """
        Stalled: ImagePullFailed
        why: rank 1/2 pod tiny-1 on node n2: failed to pull and unpack image "runner:1": failed to resolve reference: connection refused
        rank 0/2 tiny-0 on n1: RunnerPending
        rank 1/2 tiny-1 on n2: RunnerPending
        do: make the registry reachable from the node (DNS, proxy, firewall, certificates), or correct spec.runner.image
    """,
    quota_exceeded: """
        Stalled: PodRefused
        why: rank 0/2 pod tiny-0: the API server refused the pod (HTTP 403): pods "tiny-0" is forbidden: exceeded quota: small; the same on 2 ranks
        rank 0/2 tiny-0: RunnerPending
        rank 1/2 tiny-1: RunnerPending
        do: raise the ResourceQuota small, free what it counts, or lower spec.runner.resources or spec.runners
    """,
    crash_before_joining: """
        Stalled: ContainerCrashed
        why: rank 1/2 pod tiny-1 on node n2: container ends with exit code 1 before its supervisor answers, last words: ImportError: no module named mlx
        rank 0/2 tiny-0 on n1: RunnerPending
        rank 1/2 tiny-1 on n2: RunnerPending
        do: read the previous container's log: kubectl logs tiny-1 --previous
    """,
    model_not_found: """
        Stalled: ModelNotFound
        why: rank 0/2 pod tiny-0 on node n1: DownloadModel failed: no config.json at /models/source; tried again every 5 minutes; the same on 2 ranks
        rank 0/2 tiny-0 on n1: RunnerIdle, last failure ModelNotFound in epoch 1
        rank 1/2 tiny-1 on n2: RunnerIdle, last failure ModelNotFound in epoch 1
        do: correct spec.model.source: it must lead to a repository or directory with config.json and safetensors files
    """,
    downloading: """
        Not ready: 0/2 runners have the model's files; waiting for rank 0 on node n1 (downloading: 40 % of 1.2 GB) and 1 other
        rank 0/2 tiny-0 on n1: RunnerIdle, downloading: 40 % of 1.2 GB
        rank 1/2 tiny-1 on n2: RunnerIdle, downloading: 50 % of 1.2 GB, retrying: model-00001-of-00002.safetensors: HTTP 503
    """,
    token_refused: """
        Stalled: ModelUnauthorized
        why: rank 0/2 pod tiny-0 on node n1: DownloadModel failed: hf://org/gated@main: org/gated is gated (HTTP 403 for org/gated); tried again every 5 minutes
        rank 0/2 tiny-0 on n1: RunnerIdle, last failure ModelUnauthorized in epoch 1
        rank 1/2 tiny-1 on n2: RunnerIdle
        do: correct spec.model.credentialsSecretRef or its Secret, read when a pod starts: kubectl delete pod tiny-0
    """,
    spec_not_valid: """
        Stalled: InvalidSpec
        why: spec.runners: Input should be less than or equal to 64 (found 65)
        rank 0/2 tiny-0 on n1: RunnerReady, layers 0-11
        rank 1/2 tiny-1 on n2: RunnerReady, layers 0-11
        do: correct the field that the message names
    """,
}


@pytest.mark.parametrize("scene", EXPECTED, ids=lambda scene: scene.__name__)
def test_the_brief_says_word_by_word(scene: Callable[[], Cluster]) -> None:
    cluster = scene()
    lines = [line.strip() for line in EXPECTED[scene].strip().splitlines()]
    assert list(cluster.status.brief) == lines


@pytest.mark.parametrize("scene", EXPECTED, ids=lambda scene: scene.__name__)
def test_every_message_is_one_line_that_is_never_empty_and_never_too_long(scene: Callable[[], Cluster]) -> None:
    status = scene().status
    messages = [condition.message for condition in status.conditions]
    messages += [failure.message for failure in status.history] + list(status.brief)
    for message in messages:
        assert message.strip() == message
        assert "\n" not in message
        assert 0 < len(message) <= MAX_MESSAGE


@pytest.mark.parametrize("scene", EXPECTED, ids=lambda scene: scene.__name__)
def test_what_is_stalled_says_what_to_do(scene: Callable[[], Cluster]) -> None:
    status = scene().status
    stalled = status.condition(ConditionType.STALLED)
    assert stalled is not None
    if stalled.status == "True":
        assert stalled.reason.remedy
        assert status.brief[-1].startswith("do: ")


@pytest.mark.parametrize(
    ("said", "state", "told"),
    [
        ("engine killed by signal 9 (SIGKILL) in RunnerRunning", RunnerState.READY, " in RunnerRunning;"),
        ("engine exited with code 1 in RunnerLoading at 3/12 layers: no room", RunnerState.LOADING, "no room;"),
        ("engine used no CPU for 5 s while computing in RunnerRunning, step 7", RunnerState.RUNNING, "step 7;"),
        ("connection reset by rank 0", RunnerState.READY, "by rank 0, in RunnerReady;"),
    ],
)
def test_the_state_of_a_failure_is_named_exactly_once(said: str, state: RunnerState, told: str) -> None:
    cluster = ready()
    failure = LastFailure(epoch=1, time=cluster.now, state=state, reason=Reason.ENGINE_CRASHED, message=said)
    cluster.supervisor(1).publish(state=RunnerState.FAILED, since=cluster.now, failure=failure, group="absent")
    recorded, noted = see(cluster), cluster.status.runner(1).last_failure
    message = condition(cluster, ConditionType.RUNNER_FAILED).message
    assert told in message
    assert noted is not None
    for text in (message, recorded.message, noted.message):
        assert sum(text.count(name) for name in RunnerState) == 1, text
        words = text.split()
        assert not [one for one, following in pairwise(words) if one == following]
