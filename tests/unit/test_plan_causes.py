"""Each cause on Kubernetes' side, in the words that its components really use: which reason, and which next step."""

# ruff: noqa: E501 (the texts are compared word by word)
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mlx_operator.decide import remedies
from mlx_operator.decide.observed import Refusal
from mlx_operator_api import names
from mlx_operator_api.base import format_time
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.status import MAX_MESSAGE
from tests.unit.scenes import condition
from tests.unit.simulated_supervisor import UID
from tests.unit.simulator import START, Cluster
from tests.unit.test_plan_problems import placed, waiting

TOKEN = names.secret_name("tiny", UID, "abcdef0123")
QUOTA = 'pods "tiny-0" is forbidden: exceeded quota: tight, requested: pods=1, used: pods=1, limited: pods=1'
MUST = 'pods "tiny-0" is forbidden: failed quota: tight: must specify limits.memory for: runner'
LIMITS = 'pods "tiny-0" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi'
LEVEL = (
    'pods "tiny-0" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false '
    '(container "runner" must set securityContext.allowPrivilegeEscalation=false)'
)
ACCOUNT = 'pods "tiny-0" is forbidden: error looking up service account default/robot: serviceaccount "robot" not found'
PRIORITY = 'pods "tiny-0" is forbidden: no PriorityClass with name gold was found'
RUNTIME = 'pods "tiny-0" is forbidden: pod rejected: RuntimeClass "gvisor" not found'


def of_field(words: str, name: str) -> str:
    """The API server's words, with the field of ours that they are about."""
    return words.replace("is forbidden: ", f"is forbidden: spec.runner.{name}: ")


DENIED = 'admission webhook "policy.example.com" denied the request: no image from this registry'
POLICY = (
    "pods \"tiny-0\" is forbidden: ValidatingAdmissionPolicy 'limits' with binding 'all' denied request: "
    "memory limits are required"
)
UNREACHED = (
    'Internal error occurred: failed calling webhook "policy.example.com": failed to call webhook: Post '
    '"https://policy.default.svc:443/validate?timeout=10s": dial tcp 10.96.3.4:443: connect: connection refused'
)
TOO_SLOW = UNREACHED.replace("dial tcp 10.96.3.4:443: connect: connection refused", "context deadline exceeded")
NO_TIME = "Timeout: request did not complete within requested timeout - context deadline exceeded"
RBAC = (
    'pods is forbidden: User "system:serviceaccount:mlx-system:mlx-operator" cannot create resource "pods" in API '
    'group "" in the namespace "default"'
)
UNBOUND = (
    "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found. preemption: 0/2 nodes are "
    "available: 2 Preemption is not helpful for scheduling."
)
NO_CLAIM = (
    '0/2 nodes are available: persistentvolumeclaim "models" not found. preemption: 0/2 nodes are available: 2 '
    "Preemption is not helpful for scheduling."
)
SMALL = (
    "0/2 nodes are available: 2 Insufficient memory. no new claims to deallocate, preemption: 0/2 nodes are available: "
    "2 No preemption victims found for incoming pod."
)
LABEL = (
    "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. no new claims to deallocate, "
    "preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."
)
TAINT = "0/2 nodes are available: 2 node(s) had untolerated taint(s). preemption: 0/2 nodes are available: 2 Preemption"
MIXED = "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't match Pod's node affinity/selector."
NOBODY = (
    'failed to pull and unpack image "registry.invalid/runner:1": failed to resolve image: failed to do request: Head '
    '"https://registry.invalid/v2/runner/manifests/1": dial tcp: lookup registry.invalid on 10.96.0.10:53: no such host'
)
NO_TAG = (
    'failed to pull and unpack image "docker.io/library/runner:9": failed to resolve image: '
    "docker.io/library/runner:9: not found"
)
SECRET_NEEDED = (
    'failed to pull and unpack image "ghcr.io/org/runner:1": failed to resolve image: failed to authorize: failed to '
    "fetch anonymous token: unexpected status from GET request: 403 Forbidden"
)
LIMITED = (
    'failed to pull and unpack image "docker.io/library/runner:1": failed to copy: httpReadSeeker: failed open: '
    "unexpected status code 429 Too Many Requests: toomanyrequests: You have reached your pull rate limit"
)


def refused(status: int, message: str) -> Callable[[], Cluster]:
    def scene() -> Cluster:
        cluster = Cluster()
        cluster.refuse = Refusal(status, message, START)
        cluster.reconcile()
        cluster.reconcile()
        return cluster

    return scene


def unplaced(words: str) -> Callable[[], Cluster]:
    def scene() -> Cluster:
        cluster = Cluster()
        cluster.unplaceable = words
        cluster.run(30)
        return cluster

    return scene


def kubelet(reason: str, message: str, *notes: str, **spec: Any) -> Callable[[], Cluster]:
    """The kubelet's word about rank 1's container, and Events of its pod."""

    def scene() -> Cluster:
        cluster = placed(**spec)
        waiting(cluster, reason, message)
        uid = cluster.pods["tiny-1"].manifest["metadata"]["uid"]
        cluster.notes = {uid: notes}
        cluster.wait(31)
        cluster.reconcile()
        return cluster

    return scene


def ended(reason: str, code: int, message: str) -> Callable[[], Cluster]:
    """The container of rank 1 ended before its supervisor answered."""

    def scene() -> Cluster:
        cluster = placed()
        end = {"exitCode": code, "reason": reason, "message": message, "finishedAt": format_time(cluster.now)}
        waiting(cluster, "CrashLoopBackOff", "back-off 10s restarting failed container", lastState={"terminated": end})
        cluster.reconcile()
        return cluster

    return scene


@dataclass(frozen=True)
class Row:
    scene: Callable[[], Cluster]
    reason: Reason
    stalled: bool
    says: str
    advice: str


ROWS: dict[str, Row] = {
    "quota": Row(
        refused(403, QUOTA), Reason.POD_REFUSED, True, f"the API server refused the pod (HTTP 403): {QUOTA}",
        "raise the ResourceQuota tight, free what it counts, or lower spec.runner.resources or spec.runners",
    ),
    "quota that demands limits": Row(
        refused(403, MUST), Reason.POD_REFUSED, True, MUST,
        "set in spec.runner.resources what the ResourceQuota tight demands",
    ),
    "limit range": Row(
        refused(403, LIMITS), Reason.POD_REFUSED, True, LIMITS,
        "keep spec.runner.resources within the LimitRange of the namespace, or change that",
    ),
    "pod security": Row(
        refused(403, LEVEL), Reason.POD_REFUSED, True, LEVEL,
        "change the level that the namespace enforces, or correct spec.runner as the message says",
    ),
    "service account": Row(
        refused(403, ACCOUNT), Reason.POD_REFUSED, True, of_field(ACCOUNT, "serviceAccountName"),
        "create the ServiceAccount robot in the namespace of the ModelInstance, or correct "
        "spec.runner.serviceAccountName",
    ),
    "priority class": Row(
        refused(403, PRIORITY), Reason.POD_REFUSED, True, of_field(PRIORITY, "priorityClassName"),
        "create the PriorityClass gold, or correct spec.runner.priorityClassName",
    ),
    "runtime class": Row(
        refused(403, RUNTIME), Reason.POD_REFUSED, True, of_field(RUNTIME, "runtimeClassName"),
        "create the RuntimeClass gvisor, or correct spec.runner.runtimeClassName",
    ),
    "webhook that denies": Row(
        refused(400, DENIED), Reason.POD_REFUSED, True, DENIED,
        "correct spec.runner so that the admission webhook policy.example.com allows the pod, or ask its owner",
    ),
    "webhook that is down": Row(
        refused(500, UNREACHED), Reason.POD_REFUSED, False, UNREACHED,
        "bring the admission webhook policy.example.com back; it is tried again by itself",
    ),
    "webhook that does not answer": Row(
        refused(500, TOO_SLOW), Reason.POD_REFUSED, False, TOO_SLOW,
        "see why the admission webhook policy.example.com does not answer in its time; it is tried again by itself",
    ),
    "several slow webhooks": Row(
        refused(504, NO_TIME), Reason.POD_REFUSED, False,
        f"the API server did not finish in its time to create the pod (HTTP 504): {NO_TIME}",
        "look for a slow admission webhook, or an API server with too much to do; it is tried again by itself",
    ),
    "admission policy": Row(
        refused(422, POLICY), Reason.POD_REFUSED, True, POLICY,
        "correct spec.runner so that the ValidatingAdmissionPolicy limits allows the pod, or change the policy",
    ),
    "rbac": Row(
        refused(403, RBAC), Reason.POD_REFUSED, True, RBAC,
        "give the operator its permission back (helm upgrade does): kubectl auth can-i create pods --as "
        "system:serviceaccount:mlx-system:mlx-operator",
    ),
    "a refused Secret": Row(
        refused(403, f'secrets "{TOKEN}" is forbidden: exceeded quota: tight, requested: secrets=1'),
        Reason.POD_REFUSED, True, "the API server refused its Secret (HTTP 403): secrets",
        "raise the ResourceQuota tight, free what it counts, or lower spec.runner.resources or spec.runners",
    ),
    "insufficient memory": Row(
        unplaced(SMALL), Reason.UNSCHEDULABLE, False, f"not placed: {SMALL[:-1]}",
        "free or add memory on the nodes, or lower spec.runner.resources.requests",
    ),
    "node selector": Row(
        unplaced(LABEL), Reason.UNSCHEDULABLE, False, f"not placed: {LABEL[:-1]}",
        "correct spec.runner.nodeSelector or affinity, or label a node so that it matches",
    ),
    "taint": Row(
        unplaced(TAINT), Reason.UNSCHEDULABLE, False, f"not placed: {TAINT}",
        "add the taint of the nodes to spec.runner.tolerations, or take it off a node",
    ),
    "several reasons": Row(
        unplaced(MIXED), Reason.UNSCHEDULABLE, False, f"not placed: {MIXED[:-1]}", Reason.UNSCHEDULABLE.remedy
    ),
    "missing claim": Row(
        unplaced(NO_CLAIM), Reason.VOLUME_NOT_FOUND, True, NO_CLAIM[:-1],
        "create the PersistentVolumeClaim models in namespace default, or correct spec.model.source",
    ),
    "unbound claim": Row(
        unplaced(UNBOUND), Reason.VOLUME_NOT_BOUND, False, f"{UNBOUND[:-1]}; its claim is models",
        "see what holds it up: kubectl describe pvc models; it needs a StorageClass that provisions, or a free volume",
    ),
    "unbound claim, told by the kubelet": Row(
        kubelet("ContainerCreating", "", "FailedMount: Unable to attach or mount volumes: unmounted volumes=[model], "
                "unattached volumes=[], failed to process volumes=[model]: error processing PVC default/models: PVC "
                "is not bound"),
        Reason.VOLUME_NOT_BOUND, True, "PVC is not bound; its claim is models",
        "see what holds it up: kubectl describe pvc models; it needs a StorageClass that provisions, or a free volume",
    ),
    "no such host": Row(
        kubelet("ErrImagePull", NOBODY), Reason.IMAGE_PULL_FAILED, True, f"on node n2: {NOBODY}",
        "make the registry reachable from the node (DNS, proxy, firewall, certificates), or correct spec.runner.image",
    ),
    "no such tag": Row(
        kubelet("ImagePullBackOff", f'Back-off pulling image "runner:9": ErrImagePull: {NO_TAG}'),
        Reason.IMAGE_PULL_FAILED, True, f"on node n2: {NO_TAG}",
        "correct spec.runner.image: the registry has no such image",
    ),
    "pull secret": Row(
        kubelet("ErrImagePull", SECRET_NEEDED,
                "FailedToRetrieveImagePullSecret: Unable to retrieve some image pull secrets (regcred); attempting to "
                "pull the image may not succeed."),
        Reason.IMAGE_PULL_FAILED, True,
        f"{SECRET_NEEDED}; Unable to retrieve some image pull secrets (regcred)",
        "name a Secret for this registry in spec.runner.imagePullSecrets, or correct spec.runner.image",
    ),
    "rate limit": Row(
        kubelet("ErrImagePull", LIMITED), Reason.IMAGE_PULL_FAILED, True, LIMITED,
        "wait for the registry's rate limit, or give the pods an account there: spec.runner.imagePullSecrets",
    ),
    "never pulled": Row(
        kubelet("ErrImageNeverPull", 'Container image "runner:1" is not present with pull policy of Never'),
        Reason.IMAGE_PULL_FAILED, True, "is not present with pull policy of Never",
        "load the image onto the node, or set runner.image.pullPolicy of the chart to IfNotPresent",
    ),
    "invalid name": Row(
        kubelet("InvalidImageName", 'Failed to apply default image tag "runner@@": couldn\'t parse image name '
                '"runner@@": invalid reference format'),
        Reason.IMAGE_PULL_FAILED, True, "invalid reference format", "correct spec.runner.image: it is no name of an image",
    ),
    "missing hub token": Row(
        kubelet("CreateContainerConfigError", 'secret "hf-token" not found',
                model={"source": "hf://org/model", "credentialsSecretRef": {"name": "hf-token"}}),
        Reason.CONTAINER_START_ERROR, True, 'CreateContainerConfigError: secret "hf-token" not found',
        "create the Secret hf-token in namespace default, or correct spec.model.credentialsSecretRef",
    ),
    "missing key": Row(
        kubelet("CreateContainerConfigError", "couldn't find key token in Secret default/hf-token",
                model={"source": "hf://org/model", "credentialsSecretRef": {"name": "hf-token"}}),
        Reason.CONTAINER_START_ERROR, True, "couldn't find key token in Secret default/hf-token",
        "add the key that the message names to the Secret hf-token, or correct spec.model.credentialsSecretRef",
    ),
    "missing ConfigMap": Row(
        kubelet("CreateContainerConfigError", 'configmap "settings" not found'),
        Reason.CONTAINER_START_ERROR, True, 'configmap "settings" not found',
        "create the ConfigMap settings in namespace default, or correct spec.runner.env",
    ),
    "missing keys of clients": Row(
        kubelet("ContainerCreating", "",
                'FailedMount: MountVolume.SetUp failed for volume "api-keys" : secret "clients" not found',
                serving={"apiKeySecretRef": {"name": "clients"}}),
        Reason.CONTAINER_START_ERROR, True, 'secret "clients" not found',
        "create the Secret clients in namespace default, or correct spec.serving.apiKeySecretRef",
    ),
    "missing key of clients": Row(
        kubelet("ContainerCreating", "",
                'FailedMount: MountVolume.SetUp failed for volume "api-keys" : references non-existent secret key: api-key',
                serving={"apiKeySecretRef": {"name": "clients"}}),
        Reason.CONTAINER_START_ERROR, True, "references non-existent secret key: api-key",
        "add the key that the message names to the Secret clients, or correct spec.serving.apiKeySecretRef",
    ),
    "our Secret was deleted": Row(
        kubelet("ContainerCreating", "",
                f'FailedMount: MountVolume.SetUp failed for volume "token" : secret "{TOKEN}" not found'),
        Reason.CONTAINER_START_ERROR, True, f'secret "{TOKEN}" not found',
        "make its Secret again, which is done with each new pod: kubectl delete pod tiny-1",
    ),
    "one claim on two nodes": Row(
        kubelet("ContainerCreating", "",
                'FailedAttachVolume: Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) tiny-0'),
        Reason.CONTAINER_START_ERROR, True, "Multi-Attach error",
        "use a claim with the access mode ReadOnlyMany or ReadWriteMany, or keep the ranks on one node by affinity",
    ),
    "no sandbox": Row(
        kubelet("ContainerCreating", "",
                "FailedCreatePodSandBox: Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup "
                'network for sandbox "0123": plugin type="bridge" failed'),
        Reason.CONTAINER_START_ERROR, True, "failed to setup network for sandbox", Reason.CONTAINER_START_ERROR.remedy,
    ),
    "no such command": Row(
        ended("StartError", 128, "failed to create containerd task: failed to create shim task: OCI runtime create "
              'failed: exec: "mlx-runner": executable file not found in $PATH'),
        Reason.CONTAINER_START_ERROR, True, "StartError: failed to create containerd task",
        Reason.CONTAINER_START_ERROR.remedy,
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_cause_is_told_in_the_words_of_whoever_said_so_with_the_step_that_helps(row: Row) -> None:
    cluster = row.scene()
    told = condition(cluster, ConditionType.READY)
    assert (told.status, told.reason) == ("False", row.reason), told.message
    assert row.says in told.message
    assert told.message.endswith(f"; {row.advice}"), told.message
    assert len(told.message) <= MAX_MESSAGE
    assert cluster.stalled() == row.stalled
    assert cluster.status.brief[-1] == f"do: {row.advice}"
    why = next(line for line in cluster.status.brief if line.startswith("why: "))
    assert row.says in why
    assert row.advice not in why
    warnings = [event for event in cluster.events if event.reason is row.reason]
    assert [event.note for event in warnings] == [told.message]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_cause_of_kubernetes_spends_no_budget_and_ends_with_its_cause(row: Row) -> None:
    cluster = row.scene()
    assert cluster.status.restarts == 0
    assert cluster.status.history == ()
    cluster.refuse, cluster.unplaceable, cluster.notes = None, None, {}
    cluster.refusals.clear()
    cluster.run(200)
    assert cluster.ready(), cluster.status.brief
    assert cluster.status.epoch == 1


@pytest.mark.parametrize("reason", list(Reason))
def test_every_next_step_is_found_again_at_the_end_of_a_message(reason: Reason) -> None:
    if reason.remedy:
        advice = remedies.of_pod(reason.remedy, "tiny-0")
        assert remedies.split(f"rank 0/1 pod tiny-0: x; y; {advice}", reason) == ("rank 0/1 pod tiny-0: x; y", advice)
    assert remedies.split("rank 0/1 pod tiny-0: x", reason) == ("rank 0/1 pod tiny-0: x", reason.remedy)
