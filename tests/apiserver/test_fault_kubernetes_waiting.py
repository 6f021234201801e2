"""Pods that are not placed, or whose container does not start: the scheduler's and the kubelet's words, as they are."""

# ruff: noqa: E501 (the texts are compared word by word)
import time
from typing import Any

import pytest

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api.conditions import ConditionType, Reason
from tests.apiserver import injection
from tests.apiserver.faulting import seen
from tests.apiserver.harness import World
from tests.faults import Fault, Layer, fault

NO_PREEMPTION = " preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling"
SMALL = (
    "0/2 nodes are available: 2 Insufficient memory. no new claims to deallocate, preemption: 0/2 nodes are available: "
    "2 No preemption victims found for incoming pod"
)
NO_CLAIM = f'0/2 nodes are available: persistentvolumeclaim "models" not found.{NO_PREEMPTION}'
UNBOUND = f"0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.{NO_PREEMPTION}"
NO_HOST = (
    'failed to pull and unpack image "registry.invalid/runner:1": failed to resolve image: failed to do request: Head '
    '"https://registry.invalid/v2/runner/manifests/1": dial tcp: lookup registry.invalid on 10.96.0.10:53: no such host'
)
ADAPTER = "registry.invalid/adapter:1"
NO_ADAPTER = NO_HOST.replace("runner", "adapter")
NO_COMMAND = 'failed to generate container "0123" spec: failed to apply OCI options: no command specified'
VOLUME = 'MountVolume.SetUp failed for volume "api-keys" : secret "clients" not found'


def row(name: str, what: str, injected: str, reason: Reason, says: str, **more: Any) -> Fault:
    return Fault(
        id=f"kube-{name}",
        what=what,
        injected=injected,
        layer=Layer.OPERATOR,
        state=None,
        reason=reason,
        says=says,
        **{"condition": ConditionType.READY, "rank": None, "within": 3.0, **more},
    )


@fault(
    row(
        "unschedulable",
        "no node has room",
        "the scheduler's condition: Insufficient memory",
        Reason.UNSCHEDULABLE,
        f"rank 0/1 pod tiny-0: not placed: {SMALL}; free or add memory on the nodes, or lower "
        "spec.runner.resources.requests",
        ranks=1,
        rank=0,
    ),
    row(
        "claim-missing",
        "PersistentVolumeClaim missing",
        "the scheduler's condition about the claim of spec.model.source",
        Reason.VOLUME_NOT_FOUND,
        f"rank 0/1 pod tiny-0: {NO_CLAIM}; create the PersistentVolumeClaim models in namespace …, or correct "
        "spec.model.source",
        ranks=1,
        rank=0,
    ),
    row(
        "claim-unbound",
        "PersistentVolumeClaim not bound",
        "the scheduler's condition about unbound claims",
        Reason.VOLUME_NOT_BOUND,
        f"rank 0/1 pod tiny-0: {UNBOUND}; its claim is models; see what holds it up: kubectl describe pvc models; it "
        "needs a StorageClass that provisions, or a free volume",
        ranks=1,
        rank=0,
    ),
)
async def test_what_the_scheduler_says_is_told_and_its_end_is_noticed(place: World, row: Fault) -> None:
    await place.operator()
    words = {"kube-unschedulable": SMALL, "kube-claim-missing": NO_CLAIM, "kube-claim-unbound": UNBOUND}
    place.kubelet.unplaceable = f"{words[row.id]}."
    began = time.monotonic()
    await place.create(runners=row.ranks)
    instance = await seen(place, row, since=began)
    assert instance["status"]["restarts"] == 0
    await place.kubelet.place_all()
    instance = await place.until_ready()
    assert instance["status"]["epoch"] == 1


WAITING = {
    "kube-image": ("ErrImagePull", NO_HOST),
    "kube-adapter-image": ("ErrImagePull", NO_ADAPTER),
    "kube-create-container": ("CreateContainerError", NO_COMMAND),
    "kube-secret-missing": ("CreateContainerConfigError", 'secret "settings" not found'),
    "kube-configmap-missing": ("CreateContainerConfigError", 'configmap "settings" not found'),
}


@fault(
    row(
        "image",
        "image cannot be pulled",
        "the kubelet's ErrImagePull with the words of a registry that is not there",
        Reason.IMAGE_PULL_FAILED,
        f"rank 1/2 pod tiny-1 on node n2: {NO_HOST}; make the registry reachable from the node (DNS, proxy, firewall, "
        "certificates), or correct spec.runner.image",
        rank=1,
    ),
    row(
        "adapter-image",
        "the adapter's image cannot be pulled",
        "the kubelet's ErrImagePull about `oci://registry.invalid/adapter:1`, the model being on a claim",
        Reason.IMAGE_PULL_FAILED,
        f"rank 1/2 pod tiny-1 on node n2: {NO_ADAPTER}; correct spec.model.adapter.source or imagePullSecrets, or make "
        "the registry reachable",
        rank=1,
        then="the user: corrects the spec or the registry; then by itself",
    ),
    row(
        "create-container",
        "container cannot be created",
        "the kubelet's CreateContainerError",
        Reason.CONTAINER_START_ERROR,
        f"rank 1/2 pod tiny-1 on node n2: CreateContainerError: {NO_COMMAND}; create what the message names, or correct "
        "spec.runner",
        rank=1,
    ),
    row(
        "secret-missing",
        "Secret of a variable missing",
        "the kubelet's CreateContainerConfigError",
        Reason.CONTAINER_START_ERROR,
        'rank 1/2 pod tiny-1 on node n2: CreateContainerConfigError: secret "settings" not found; create the Secret '
        "settings in namespace …, or correct spec.runner.env",
        rank=1,
    ),
    row(
        "configmap-missing",
        "ConfigMap of a variable missing",
        "the kubelet's CreateContainerConfigError",
        Reason.CONTAINER_START_ERROR,
        'rank 1/2 pod tiny-1 on node n2: CreateContainerConfigError: configmap "settings" not found; create the '
        "ConfigMap settings in namespace …, or correct spec.runner.env",
        rank=1,
    ),
)
async def test_what_the_kubelet_says_of_a_container_is_told_and_its_end_is_noticed(place: World, row: Fault) -> None:
    await place.operator()
    injection.held(place, "ContainerCreating", "", "tiny-0")
    injection.held(place, *WAITING[row.id], "tiny-1")
    began = time.monotonic()
    if row.id == "kube-adapter-image":
        model = {"source": "pvc://models/tiny", "adapter": {"source": f"oci://{ADAPTER}"}}
        await place.create(model=model)
    else:
        await place.create()
    instance = await seen(place, row, since=began)
    assert instance["status"]["restarts"] == 0
    assert "history" not in instance["status"]
    injection.released(place)
    if row.id == "kube-adapter-image":  # this kubelet mounts no images
        return
    instance = await place.until_ready()
    assert instance["status"]["epoch"] == 1
    assert instance["status"].get("restarts", 0) == 0, "what a pod waits for spends no budget"


@fault(
    row(
        "mount",
        "Secret of a volume missing",
        "the kubelet's Event FailedMount",
        Reason.CONTAINER_START_ERROR,
        f"rank 0/2 pod tiny-0 on node n1: FailedMount: {VOLUME}; create the Secret clients in namespace …, or correct "
        "spec.serving.apiKeySecretRef",
        rank=0,
        condition=ConditionType.STALLED,
        within=35.0,
    )
)
async def test_what_the_kubelet_says_of_a_volume_is_told_from_its_events(place: World, row: Fault) -> None:
    await place.operator()
    injection.held(place, "ContainerCreating", "", "tiny-0", "tiny-1")
    began = time.monotonic()
    await place.create(serving={"apiKeySecretRef": {"name": "clients"}})
    await injection.says(place, "tiny-0", "FailedMount", VOLUME)
    await seen(place, row, since=began)
    # The volume mounts, and the image is being pulled: the warning of before is over, though its Event is still there.
    await injection.says(place, "tiny-0", "Pulling", 'Pulling image "runner:1"', "Normal")
    await place.until(
        lambda i: not injection.stalled(i, Reason.CONTAINER_START_ERROR), "the mount is no problem any more"
    )


@fault(
    row(
        "crash-before-joining",
        "container ends before its supervisor answers",
        "the kubelet's CrashLoopBackOff after exit code 1, with the log's last lines",
        Reason.CONTAINER_CRASHED,
        "rank 1/2 pod tiny-1 on node n2: container ends with exit code 1 before its supervisor answers, last words: "
        "ModuleNotFoundError: No module named 'mlx_runner'; read the previous container's log: kubectl logs tiny-1 "
        "--previous",
        rank=1,
    )
)
async def test_a_container_that_ends_at_once_is_told_with_its_last_words(place: World, row: Fault) -> None:
    await place.operator()
    words = "Traceback (most recent call last):\nModuleNotFoundError: No module named 'mlx_runner'\n"
    back_off = "back-off 20s restarting failed container=runner pod=tiny-1"
    injection.held(place, "ContainerCreating", "", "tiny-0")
    injection.held(place, "CrashLoopBackOff", back_off, "tiny-1")
    place.kubelet.crashed["tiny-1"] = {"exitCode": 1, "reason": "Error", "message": words}
    began = time.monotonic()
    await place.create()
    await seen(place, row, since=began)
    place.kubelet.crashed.clear()
    injection.released(place)
    await place.until_ready()


@pytest.mark.parametrize("which", ["schedule", "pull"])
async def test_a_deadline_says_how_long_was_waited_and_for_what(place: World, which: str) -> None:
    await place.operator()
    place.kubelet.unplaceable = f"{SMALL}." if which == "schedule" else ""
    injection.held(place, "ContainerCreating", "", "tiny-0", "tiny-1")
    await place.create(deadlines={which: "3s"})
    reason = Reason.UNSCHEDULABLE if which == "schedule" else Reason.PULL_TIMEOUT
    instance = await place.until(lambda i: injection.stalled(i, reason), "its deadline is over")
    message = injection.message(instance, ConditionType.STALLED)
    if which == "schedule":
        assert f"not placed within 3 s: {SMALL}" in message
    else:
        assert "its container did not start within 3 s: ContainerCreating" in message
    assert instance["status"]["restarts"] == 0
    injection.released(place)
    await place.kubelet.place_all()
    await place.until_ready()


NO_IMAGE_VOLUMES = "image volume is not supported by the container runtime"


@fault(
    row(
        "no-scheduler",
        "no scheduler",
        "nobody says anything of a pod that is not placed",
        Reason.SCHEDULE_TIMEOUT,
        "rank 0/1 pod tiny-0: not placed within 2 s: the scheduler said nothing: is it running?; see the scheduler's "
        "words in the message",
        ranks=1,
        rank=0,
        condition=ConditionType.STALLED,
        within=600.0,
    ),
    row(
        "slow-start",
        "a container that does not start",
        "the kubelet says ContainerCreating and nothing else",
        Reason.PULL_TIMEOUT,
        "rank 0/1 pod tiny-0 on node n1: its container did not start within 2 s: ContainerCreating; see the kubelet's "
        "words in the message",
        ranks=1,
        rank=0,
        condition=ConditionType.STALLED,
        within=600.0,
    ),
    row(
        "image-volume",
        "a node without image volumes",
        "the kubelet's CreateContainerError (the words are made up: no such node was at hand)",
        Reason.IMAGE_VOLUME_UNSUPPORTED,
        f"rank 0/1 pod tiny-0 on node n1: CreateContainerError: {NO_IMAGE_VOLUMES}; upgrade the nodes, or use a pvc:// "
        "source in spec.model.source",
        ranks=1,
        rank=0,
    ),
)
async def test_what_nobody_or_only_the_runtime_explains_is_told_with_how_long_was_waited(
    place: World, row: Fault
) -> None:
    await place.operator()
    spec: dict[str, Any] = {"deadlines": {"schedule": "2s", "pull": "2s"}}
    match row.id:
        case "kube-no-scheduler":
            spec["runner"] = {"nodeSelector": {"disk": "ssd"}}
        case "kube-slow-start":
            injection.held(place, "ContainerCreating", "", "tiny-0")
        case _:
            injection.held(place, "CreateContainerError", NO_IMAGE_VOLUMES, "tiny-0")
            spec["model"] = {"source": "oci://registry.example/tiny:1"}
    began = time.monotonic()
    await place.create(runners=row.ranks, **spec)
    await seen(place, row, since=began)
    if row.id == "kube-no-scheduler":
        healed = {"spec": {"runner": {"nodeSelector": None}}}
        await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", healed)
    injection.released(place)
    if row.id != "kube-image-volume":  # this kubelet brings models by claims only
        await place.until_ready()
