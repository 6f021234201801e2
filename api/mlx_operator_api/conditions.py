"""Condition types and the catalogue of reasons: what each means, how it is retried, what the user should do.

docs/troubleshooting.md is generated from this file. Members stand in the order of the lifecycle: the ordinal of a
reason is part of an Event's name, after its step, because `kubectl describe` lists events by name.
"""

from enum import StrEnum


class ConditionType(StrEnum):
    """Types of `status.conditions`. All are present from the first pass; none is ever removed."""

    READY = "Ready"
    """True: the group answers requests. False: it does not, and reason and message say why. The summary."""
    RECONCILING = "Reconciling"
    """kstatus: True while work is under way that will change the state by itself."""
    STALLED = "Stalled"
    """kstatus: True when waiting will not help: somebody has to act."""
    SCHEDULED = "Scheduled"
    """True: every rank's pod is placed on a node and its container runs."""
    MODEL_AVAILABLE = "ModelAvailable"
    """True: every file that the ranks need is present and verified."""
    CONNECTED = "Connected"
    """True: the group of this epoch is formed (at once with one runner)."""
    LOADED = "Loaded"
    """True: every rank holds its shard."""
    RUNNER_FAILED = "RunnerFailed"
    """True from a recorded failure until the group is Ready again; then False, with the last failure in its message."""


class Retry(StrEnum):
    """How a failure with this reason is retried."""

    RESTART = "Restart"
    """A new epoch after the back-off; spends the restart budget."""
    FREE = "Free"
    """A new epoch after the back-off; not the model's fault, so the budget is not touched."""
    NEVER = "Never"
    """Stalled at once, until the spec or an annotation changes: trying again cannot help."""
    WAIT = "Wait"
    """Nothing is restarted: what is missing is waited for, and picked up by itself when it appears."""
    NONE = "None"
    """No failure."""


class Reason(StrEnum):
    """One-word causes, used in conditions, events, reports and the history."""

    retry: Retry
    meaning: str
    """What it means and who sets it."""
    remedy: str
    """What the user should do; empty where there is nothing to do."""
    ordinal: int
    """Position in the lifecycle; the same for ever within a release."""

    def __new__(cls, value: str, retry: Retry, meaning: str, remedy: str = "") -> "Reason":  # noqa: D102
        member = str.__new__(cls, value)
        member._value_ = value
        member.retry = retry
        member.meaning = meaning
        member.remedy = remedy
        member.ordinal = len(cls.__members__)
        member.__doc__ = meaning
        return member

    # -- steps of the lifecycle (Normal events; reasons of conditions while things go well)
    UNKNOWN = "Unknown", Retry.NONE, "Nothing was observed yet. Set by the operator on the first pass."
    SUSPENDED = (
        "Suspended",
        Retry.NONE,
        "spec.suspend is true: the pods are removed, the object and its history are kept.",
        "set spec.suspend to false to start it again",
    )
    WAITING_FOR_PODS = "WaitingForPods", Retry.NONE, "Pods are being created, placed, or their image is being pulled."
    PODS_CREATED = "PodsCreated", Retry.NONE, "The pods of all ranks were created."
    PODS_RUNNING = "PodsRunning", Retry.NONE, "Every rank's pod is placed and its container runs."
    WAITING_FOR_RUNNERS = "WaitingForRunners", Retry.NONE, "The supervisors in the pods are being reached."
    EPOCH_STARTED = "EpochStarted", Retry.NONE, "A new epoch of the group was started in its pods."
    DOWNLOADING = "Downloading", Retry.NONE, "The model's files are being fetched or verified."
    MODEL_VERIFIED = "ModelVerified", Retry.NONE, "Every file that the ranks need is present and verified."
    CONNECTING = "Connecting", Retry.NONE, "The ranks are connecting to each other."
    SINGLE_RUNNER = "SingleRunner", Retry.NONE, "One runner: there is no group to form."
    GROUP_CONNECTED = "GroupConnected", Retry.NONE, "Every rank is connected to every other that it needs."
    LOADING = "Loading", Retry.NONE, "The ranks are reading their shards."
    MODEL_LOADED = "ModelLoaded", Retry.NONE, "Every rank holds its shard."
    WARMING_UP = "WarmingUp", Retry.NONE, "The first forward passes are running."
    WAITING_FOR_ENDPOINT = (
        "WaitingForEndpoint",
        Retry.NONE,
        "All ranks are ready; rank 0's pod is not Ready for its Service yet.",
    )
    READY = "Ready", Retry.NONE, "The group answers requests."
    RECONCILED = "Reconciled", Retry.NONE, "There is nothing to do."
    PROGRESSING = "Progressing", Retry.NONE, "Work is under way."
    NO_FAILURE = "NoFailure", Retry.NONE, "No failure was recorded."
    RECOVERED = "Recovered", Retry.NONE, "The group is Ready again after a failure."
    SPEC_CHANGED = "SpecChanged", Retry.FREE, "The spec changed in a way that needs a new epoch."
    RESTART_REQUESTED = (
        "RestartRequested",
        Retry.FREE,
        "A new value of the annotation mlx-operator.dev/restart asked for a new epoch.",
    )
    RETRY_REQUESTED = (
        "RetryRequested",
        Retry.FREE,
        "A new value of the annotation mlx-operator.dev/retry asked to start again.",
    )
    RUNNER_FAILED = "RunnerFailed", Retry.NONE, "Reason of the Warning event of a failure; its note names the cause."
    RESTART_BACKOFF = "RestartBackoff", Retry.NONE, "The group failed; the next epoch starts when the back-off is over."

    # -- the spec
    INVALID_SPEC = (
        "InvalidSpec",
        Retry.NEVER,
        "The stored spec is not valid (an older CRD may have admitted it).",
        "correct the field that the message names",
    )

    # -- what Kubernetes says of the pods (set by the operator)
    CHILD_CONFLICT = (
        "ChildConflict",
        Retry.WAIT,
        "An object with the name of one of our children exists and belongs to somebody else, or lost our label.",
        "delete or rename the object that the message names, or rename the ModelInstance",
    )
    POD_REFUSED = (
        "PodRefused",
        Retry.WAIT,
        "The API server refused a child: quota, admission, PodSecurity, or a field of spec.runner.",
        "read the API server's words in the message and correct the spec, the quota or the policy",
    )
    UNSCHEDULABLE = (
        "Unschedulable",
        Retry.WAIT,
        "The scheduler finds no node for a rank's pod; the message carries its words.",
        "free or add resources, or correct spec.runner.nodeSelector, tolerations, affinity or resources.requests",
    )
    IMAGE_PULL_FAILED = (
        "ImagePullFailed",
        Retry.WAIT,
        "The kubelet cannot pull the runner image; the message carries the registry's words.",
        "correct spec.runner.image or imagePullSecrets, or make the registry reachable",
    )
    IMAGE_VOLUME_UNSUPPORTED = (
        "ImageVolumeUnsupported",
        Retry.WAIT,
        "The node does not support image volumes, which oci:// sources need (1.35+).",
        "upgrade the nodes, or use a pvc:// source",
    )
    CONTAINER_START_ERROR = (
        "ContainerStartError",
        Retry.WAIT,
        "The kubelet cannot mount a volume, or create or start the container (missing Secret, ConfigMap, command).",
        "create what the message names, or correct spec.runner",
    )
    VOLUME_NOT_FOUND = (
        "VolumeNotFound",
        Retry.WAIT,
        "The PersistentVolumeClaim of the model or the cache does not exist.",
        "create the claim in the namespace of the ModelInstance, or correct spec.model.source or spec.cache",
    )
    VOLUME_NOT_BOUND = (
        "VolumeNotBound",
        Retry.WAIT,
        "A PersistentVolumeClaim of the pod exists, and no volume is bound to it.",
        "see what its events say: kubectl describe pvc; it needs a StorageClass that provisions, or a free volume",
    )
    CONTAINER_CRASHED = (
        "ContainerCrashed",
        Retry.RESTART,
        "The container of a rank ended, supervisor included, without a word of its own.",
        "read the previous container's log: kubectl logs POD --previous",
    )
    OUT_OF_MEMORY = (
        "OutOfMemory",
        Retry.RESTART,
        "The kernel killed the engine or the container for memory.",
        "raise spec.runner.resources.limits.memory, use more runners, or a smaller model",
    )
    PROBE_FAILED = (
        "LivenessProbeFailed",
        Retry.RESTART,
        "The kubelet ended the container of a rank: its supervisor did not answer the liveness probe for a minute.",
        "look at the load and the memory of the node; the log of the container before: kubectl logs POD --previous",
    )
    EVICTED = (
        "Evicted",
        Retry.FREE,
        "The kubelet or the API evicted a rank's pod (node pressure, drain, preemption).",
        "nothing, once a node has room for the new pod; who evicted it stands in the message",
    )
    POD_DELETED = (
        "PodDeleted",
        Retry.FREE,
        "Somebody deleted the pod of a rank that had joined the epoch.",
        "nothing: a new pod is made and the group starts again",
    )
    NODE_LOST = (
        "NodeLost",
        Retry.FREE,
        "The node of a rank's pod is NotReady or gone.",
        "nothing for the group, which moves to other nodes; look at the node: kubectl describe node",
    )

    POD_STUCK = (
        "PodStuckTerminating",
        Retry.WAIT,
        "A pod that has to go does not: a finalizer holds it, its kubelet does not confirm the end, or the API server "
        "refuses to delete it.",
        "look at the kubelet of its node; if its containers are surely gone: kubectl delete pod POD --force",
    )

    # -- the model
    SOURCE_UNSUPPORTED = (
        "SourceUnsupported",
        Retry.NEVER,
        "The runner image cannot read spec.model.source, which the operator knows. Set by the runner.",
        "use a runner image of the operator's own release, or another kind of source",
    )
    MODEL_NOT_FOUND = (
        "ModelNotFound",
        Retry.WAIT,
        "The source has no model, repository, revision or file at that place. Set by the runner.",
        "correct spec.model.source: it must lead to a repository or directory with config.json and safetensors files",
    )
    MODEL_UNAUTHORIZED = (
        "ModelUnauthorized",
        Retry.WAIT,
        "The hub asks for a token, or refuses the one it got: the repository is private or gated.",
        "correct spec.model.credentialsSecretRef or its Secret, read when a pod starts: kubectl delete pod POD",
    )
    MODEL_UNREACHABLE = (
        "ModelUnreachable",
        Retry.WAIT,
        "The source could not be reached or read until deadlines.download; it is tried again, from where it stopped.",
        "check the network, the source and HF_ENDPOINT in spec.runner.env",
    )
    MODEL_CORRUPT = (
        "ModelCorrupt",
        Retry.NEVER,
        "A file of the model is truncated, unreadable or does not match its index, its sha256 or the hub's list.",
        "replace the file that the message names, then set the annotation mlx-operator.dev/retry to a new value",
    )
    MODEL_UNSUPPORTED = (
        "ModelUnsupported",
        Retry.NEVER,
        "The architecture is unknown to mlx-lm, or cannot be split this way.",
        "use another model, another spec.sharding or another number of runners, as the message says",
    )
    NO_SPACE = (
        "NoSpace",
        Retry.WAIT,
        "The cache has no room for the model's files.",
        "raise spec.cache.sizeLimit, enlarge or clean the claim of spec.cache.claimName, or use more runners",
    )
    INSUFFICIENT_MEMORY = (
        "InsufficientMemory",
        Retry.NEVER,
        "The shard does not fit into the memory limit; the message has the sum.",
        "raise spec.runner.resources.limits.memory or spec.runners",
    )

    # -- a runner of the epoch (set by its supervisor, deadlines also by the operator)
    CONNECT_TIMEOUT = (
        "ConnectTimeout",
        Retry.RESTART,
        "A rank was not connected within deadlines.connect; the message says to whom, and what was seen of that one.",
        "check that pods can reach each other on port 8082 (and 8100-8199 for Tensor): NetworkPolicies, the CNI",
    )
    DOWNLOAD_TIMEOUT = (
        "DownloadTimeout",
        Retry.FREE,
        "The files were not present within deadlines.download, and the supervisor did not end the attempt.",
        "raise spec.deadlines.download, or look at the source",
    )
    LOAD_TIMEOUT = (
        "LoadTimeout",
        Retry.RESTART,
        "The shard was not loaded within deadlines.load.",
        "raise spec.deadlines.load, or use faster storage",
    )
    WARMUP_TIMEOUT = (
        "WarmupTimeout",
        Retry.RESTART,
        "The warm-up did not end within deadlines.warmup.",
        "raise spec.deadlines.warmup, or give the runner more CPU",
    )
    CONNECT_FAILED = (
        "ConnectFailed",
        Retry.RESTART,
        "Forming the group failed with an error.",
        "see the error in the message and the log: kubectl logs POD",
    )
    LOAD_FAILED = (
        "LoadFailed",
        Retry.RESTART,
        "Loading failed with an error.",
        "see the error in the message and the log: kubectl logs POD",
    )
    WARMUP_FAILED = (
        "WarmupFailed",
        Retry.RESTART,
        "The warm-up failed with an error.",
        "see the error in the message and the log: kubectl logs POD",
    )
    TASK_REJECTED = (
        "TaskRejected",
        Retry.NONE,
        "A runner did not accept a task; it lives on in its state. The note says why.",
        "report it with the line: the operator should not have sent this task",
    )
    ENGINE_CRASHED = (
        "EngineCrashed",
        Retry.RESTART,
        "The engine process ended: by a signal, an abort, or an error.",
        "read the evidence in the message and the log: kubectl logs POD",
    )
    RUNNER_STALLED = (
        "RunnerStalled",
        Retry.RESTART,
        "The engine made no progress within deadlines.progress, or was stopped.",
        "look at the node's load; raise spec.deadlines.progress for very slow machines",
    )
    PEER_LOST = (
        "PeerLost",
        Retry.RESTART,
        "A rank lost its connection to another one: usually a consequence.",
        "look at the rank that the message accuses",
    )
    RUNNER_UNREACHABLE = (
        "RunnerUnreachable",
        Retry.RESTART,
        "The operator hears nothing of a rank's supervisor although its pod runs: no connection, or a stopped process.",
        "where there is no connection, check NetworkPolicies between the operator and the pods (port 8081), else the "
        "pod and its node: kubectl describe pod POD",
    )
    REPORT_UNDECODABLE = (
        "ReportUndecodable",
        Retry.WAIT,
        "A supervisor's report could not be decoded; the runner itself may be fine.",
        "use a runner image of the operator's own release or the one before",
    )
    PROTOCOL_MISMATCH = (
        "ProtocolMismatch",
        Retry.NEVER,
        "The runner image speaks a version of the control protocol that we do not.",
        "use a runner image of the operator's own release or the one before",
    )
    POD_NOT_READY = (
        "PodNotReady",
        Retry.WAIT,
        "Every runner is ready, but rank 0's pod is not Ready, so its Service has no endpoint.",
        "see which probe or readiness gate fails, and why: kubectl describe pod POD",
    )
    SCHEDULE_TIMEOUT = (
        "ScheduleTimeout",
        Retry.WAIT,
        "A pod was not placed within deadlines.schedule.",
        "see the scheduler's words in the message",
    )
    PULL_TIMEOUT = (
        "PullTimeout",
        Retry.WAIT,
        "A container did not start within deadlines.pull.",
        "see the kubelet's words in the message",
    )
    RESTART_BUDGET_EXHAUSTED = (
        "RestartBudgetExhausted",
        Retry.NEVER,
        "The group failed more often than spec.restartPolicy.maxRestarts allows.",
        "see the last failure; correct the spec, or set the annotation mlx-operator.dev/retry to a new value",
    )
