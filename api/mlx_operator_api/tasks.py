"""Tasks and reports on the wire between the operator and a runner's supervisor.

The control API (port `names.CONTROL_PORT`, `Authorization: Bearer TOKEN`):

- `POST /tasks` with a `TaskRequest` → 200 and a `TaskAnswer`, also when the task is rejected (a rejection is data);
  400 when the body cannot be decoded, 401 on a wrong token, 409 when the sender's `lease_transitions` is lower than
  one seen before (a leader that was replaced).
- `GET /report` → the current `RunnerReport`.
- `GET /reports` → NDJSON: the current report at once, then one `RunnerReport` per change, and one every
  `HEARTBEAT_SECONDS` when nothing changes. Each carries a higher `seq`.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from .base import Lenient, Time
from .conditions import Reason
from .runner import RunnerState, TaskName, TaskRejected
from .status import LastFailure

PROTOCOL = 1
"""Version of this protocol. Operator and supervisor each speak their own and the one before."""
HEARTBEAT_SECONDS = 2.0
"""So that a supervisor that was stopped is noticed within seconds: its kernel keeps the connection alive for it."""


class Sharding(StrEnum):
    """How a model is split over the ranks."""

    PIPELINE = "Pipeline"
    TENSOR = "Tensor"


class Peer(Lenient):
    """Where a rank is found."""

    rank: Annotated[int, Field(ge=0)]
    pod_ip: str
    """IPv4 address."""
    port: int
    """Port of the frame connection; ring ports follow from the epoch."""


class ServingOptions(Lenient):
    """Limits of the public API; `None` takes the runner's default."""

    max_concurrent_requests: int = 16
    max_queue: int = 64
    max_tokens: int | None = None
    context_length: int | None = None
    prompt_cache_bytes: int | None = None


class DeadlineSeconds(Lenient):
    """The supervisor's own deadlines, in seconds. The operator waits 10 s longer for each."""

    download: float = 3600.0
    connect: float = 40.0
    load: float = 600.0
    warmup: float = 300.0
    progress: float = 120.0
    shutdown: float = 30.0
    resume: float = 60.0
    """Not of a state: for how long requests of clients are held for the next epoch."""


class GroupCause(Lenient):
    """The root cause for which an epoch of the group failed, as the operator knows it."""

    epoch: int
    rank: int
    reason: Reason
    signal: str | None = None


class CreateRunner(Lenient):
    """Start a fresh engine for this epoch; the engine of an older epoch is killed and waited for first."""

    name: Literal[TaskName.CREATE_RUNNER] = TaskName.CREATE_RUNNER
    world_size: int
    sharding: Sharding = Sharding.PIPELINE
    source: str
    """`spec.model.source`."""
    adapter: str | None = None
    """`spec.model.adapter.source`."""
    served_name: str
    serving: ServingOptions = ServingOptions()
    memory_limits: tuple[int | None, ...] = ()
    """Bytes that each rank's container may use, by rank (None: no limit); empty: not known. Layers are split by it."""
    deadlines: DeadlineSeconds = DeadlineSeconds()
    cause: GroupCause | None = None
    """Why the group failed last. A rank that only lost its peer cannot know it."""


class DownloadModel(Lenient):
    """Make the files this rank needs present and verified."""

    name: Literal[TaskName.DOWNLOAD_MODEL] = TaskName.DOWNLOAD_MODEL
    revision: str | None = None
    """The commit of an `hf://` repository that every rank uses; None: resolve the source's revision and report it."""
    adapter_revision: str | None = None
    """The same of an `hf://` adapter."""
    memory_limits: tuple[int | None, ...] = ()
    """Of all ranks, by rank, in bytes (None: no limit): they say which layers are whose. Empty: not known."""


class ConnectToGroup(Lenient):
    """Connect to every peer and shake hands for this epoch."""

    name: Literal[TaskName.CONNECT_TO_GROUP] = TaskName.CONNECT_TO_GROUP
    peers: tuple[Peer, ...]
    """All ranks, this one included, by rank."""


class LoadModel(Lenient):
    """Load this rank's shard."""

    name: Literal[TaskName.LOAD_MODEL] = TaskName.LOAD_MODEL


class StartWarmup(Lenient):
    """Run the first forward passes."""

    name: Literal[TaskName.START_WARMUP] = TaskName.START_WARMUP


class Shutdown(Lenient):
    """End the engine: running requests finish within `grace_seconds`, then it is killed."""

    name: Literal[TaskName.SHUTDOWN] = TaskName.SHUTDOWN
    grace_seconds: float = 0.0
    final: bool = False
    """No other epoch follows by itself: no request is held for one."""


Task = Annotated[
    CreateRunner | DownloadModel | ConnectToGroup | LoadModel | StartWarmup | Shutdown, Field(discriminator="name")
]


class TaskRequest(Lenient):
    """One task for one runner.

    (uid, epoch, rank, task name, attempt) is its identity: sent again it is answered with its present outcome and
    never run twice.
    """

    protocol: int = PROTOCOL
    instance_uid: str
    epoch: Annotated[int, Field(ge=1)]
    rank: Annotated[int, Field(ge=0)]
    attempt: Annotated[int, Field(ge=1)] = 1
    """Grows only for DownloadModel, after a failure."""
    lease_transitions: int = 0
    """Of the leader that sends it; a supervisor refuses a lower one than it has seen."""
    task: Task


class TaskPhase(StrEnum):
    """How far a task is."""

    RUNNING = "Running"
    COMPLETE = "Complete"
    FAILED = "Failed"
    REJECTED = "Rejected"


class TaskOutcome(Lenient):
    """What became of a task of the current epoch."""

    name: TaskName
    epoch: int
    attempt: int = 1
    phase: TaskPhase
    rejection: TaskRejected | None = None
    reason: Reason | None = None
    """Of a failed DownloadModel, which does not fail the runner."""
    message: str | None = None


class Predecessor(Lenient):
    """What the supervisor's predecessor in the same pod last wrote before it died."""

    incarnation: str
    epoch: int
    state: RunnerState
    last_report: Time
    failure: LastFailure | None = None
    """Set when it had already reported a failure itself."""


class ModelFacts(Lenient):
    """What is known of the model's files. Complete once DownloadModel is; the revisions already while it runs."""

    revision: str | None = None
    """The commit of an `hf://` repository."""
    adapter_revision: str | None = None
    """The same of an `hf://` adapter."""
    digest: str | None = None
    """sha256 over the names, sizes and (where known) hashes of the files."""
    bytes: int = 0
    architecture: str | None = None
    layers: int = 0


class RunnerReport(Lenient):
    """All that a supervisor knows of its runner: complete each time, so any report may be lost."""

    protocol: int = PROTOCOL
    instance_uid: str
    rank: int
    incarnation: str
    """Start of this supervisor process; sorts by time as text."""
    seq: int
    """Grows by one with every report of an incarnation."""
    epoch: int = 0
    """0: no runner yet."""
    world_size: int = 1
    state: RunnerState = RunnerState.PENDING
    since: Time
    """When the state was entered."""
    group: Literal["present", "absent"] = "absent"
    tasks: tuple[TaskOutcome, ...] = ()
    """Of this epoch, in the order of arrival; the last rejection of each task name is kept."""
    model_available: bool = False
    model: ModelFacts | None = None
    download_percent: int | None = None
    download_bytes: int | None = None
    """What `download_percent` is of."""
    download_trouble: str | None = None
    """Why the download gets nowhere at the moment; it goes on trying."""
    layers: str | None = None
    """Layers of this rank's shard, such as `0-11`."""
    layers_loaded: int = 0
    layers_total: int = 0
    note: str | None = None
    """What a person should know of the loaded shard, such as `cast from bfloat16 to float32 on CPU`."""
    waiting_for: tuple[int, ...] = ()
    """Ranks whose connection is still missing, while Connecting."""
    ring_listening: bool = False
    """Tensor: this rank's ring port listens (read from /proc/net/tcp, never by connecting)."""
    active_requests: int = 0
    steps: int = 0
    failure: LastFailure | None = None
    """Why this epoch's runner failed; with RunnerFailed only."""
    peer: int | None = None
    """The rank that a PeerLost failure accuses."""
    predecessor: Predecessor | None = None
    memory_limit_bytes: int | None = None
    draining: bool = False
    """SIGTERM was received."""


class TaskAnswer(Lenient):
    """Answer to `POST /tasks`."""

    outcome: TaskOutcome
    report: RunnerReport
