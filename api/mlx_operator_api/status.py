"""Status of a ModelInstance: everything the operator knows, and the only place where it keeps it."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Strict, Time
from .conditions import ConditionType, Reason
from .names import MAX_RUNNERS
from .runner import RunnerState

MAX_MESSAGE = 1024
MAX_HISTORY = 5
_LIST_MAP = "x-kubernetes-list-type"
_LIST_KEYS = "x-kubernetes-list-map-keys"

Message = Annotated[str, Field(max_length=4096)]


class LastFailure(Strict):
    """One failure of one rank: what was observed."""

    epoch: int
    """Epoch in which it happened."""
    time: Time
    """When it was observed."""
    state: RunnerState
    """State of the rank at that moment."""
    reason: Reason
    """One word of the catalogue of reasons."""
    message: Message
    """What happened, with its evidence, in one line."""
    exit_code: int | None = None
    """Exit code of the engine or container, where it exited."""
    signal: str | None = None
    """Name of the signal that ended it, such as SIGKILL."""
    diagnostics: Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=8)] = ()
    """First meaningful lines of evidence."""


class RunnerStatus(Strict):
    """One rank."""

    rank: Annotated[int, Field(ge=0, lt=MAX_RUNNERS)]
    """Rank in the group; rank 0 answers clients and holds the last layers."""
    pod: str | None = None
    """Name of the pod."""
    pod_uid: Annotated[str | None, Field(alias="podUID")] = None
    """uid of the pod that joined the epoch: another one means that the pod was replaced."""
    node: str | None = None
    """Node the pod is on."""
    state: RunnerState = RunnerState.PENDING
    """State as the runner's own report gave it; RunnerReady also while it is busy: requests cause no writes."""
    since: Time | None = None
    """When the state was entered."""
    epoch: int = 0
    """Last epoch that this rank joined (0: none)."""
    incarnation: str | None = None
    """Start of the supervisor process that joined the epoch: another one means that the container restarted."""
    memory_limit_bytes: Annotated[int | None, Field(json_schema_extra={"format": "int64"})] = None
    """Memory limit of its container when it joined the epoch; layers are split by those of all ranks."""
    layers: str | None = None
    """Layers of its shard."""
    note: Annotated[str | None, Field(max_length=1024)] = None
    """What is special about its shard, such as a conversion."""
    progress: str | None = None
    """Loading or download, in coarse steps."""
    last_failure: LastFailure | None = None
    """Last failure of this rank; survives restarts of everything."""


class GroupFailure(Strict):
    """One failure of the group: its cause, with the ranks it took along."""

    epoch: int
    """Epoch that failed."""
    time: Time
    """When it was recorded."""
    reason: Reason
    """Reason of the cause."""
    rank: int | None = None
    """Rank that is the cause."""
    message: Message
    """Who, what, evidence."""
    consequences: tuple[int, ...] = ()
    """Ranks that failed because of it."""


class AdapterStatus(Strict):
    """The adapter that is fused into the model."""

    source: str
    """The source that was resolved."""
    revision: str | None = None
    """Commit of the hub's repository that all ranks use, over restarts too."""


class ModelStatus(Strict):
    """What is served."""

    source: str | None = None
    """The source that was resolved."""
    revision: str | None = None
    """Commit of the hub's repository that all ranks use, over restarts too."""
    adapter: AdapterStatus | None = None
    """The adapter, if the spec names one."""
    digest: str | None = None
    """Digest over the files, those of the adapter included."""
    bytes: Annotated[int | None, Field(json_schema_extra={"format": "int64"})] = None
    """Size of all weight files."""

    @property
    def sources(self) -> tuple[str | None, str | None]:
        """Of the model and of its adapter."""
        return self.source, self.adapter.source if self.adapter is not None else None


class Condition(Strict):
    """metav1.Condition."""

    type: ConditionType
    """What it is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Reason
    """One word of the catalogue of reasons."""
    message: Annotated[str, Field(max_length=32768)]
    """Who, what, evidence, next step."""
    last_transition_time: Time
    """When `status` last changed."""
    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})]
    """Generation of the object that this is about."""


class Status(Strict):
    """Observed state. Programs read `conditions` and `runners`; people read `brief` first."""

    brief: Annotated[tuple[Message, ...], Field(max_length=MAX_RUNNERS + 8)] = ()
    """The state in a few lines: headline, one line a rank (cause first), what comes next, what to do."""
    observed_generation: Annotated[int | None, Field(json_schema_extra={"format": "int64"})] = None
    """Generation of the spec that this status is about."""
    epoch: int = 0
    """Epoch of the group: grows by one with every start of all engines."""
    ready_runners: int = 0
    """Ranks that are RunnerReady or RunnerRunning."""
    runners_ready: str | None = None
    """The same as READY/TOTAL, for the column."""
    restarts: int = 0
    """Failures that spent the budget since the last sustained Ready."""
    next_restart_at: Time | None = None
    """When the next epoch starts, while backing off."""
    endpoint: str | None = None
    """Base URL for an OpenAI client in the cluster."""
    model: ModelStatus | None = None
    """The model as resolved."""
    runner_image: str | None = None
    """Image of the runner pods: fixed at the first pod, kept over upgrades of the operator."""
    template_hash: str | None = None
    """Hash of the pod template of the current pods."""
    spec_hash: str | None = None
    """Hash of what the running epoch was started with; another one means that a new epoch is due."""
    observed_retry: str | None = None
    """Last value of the annotation mlx-operator.dev/retry that was acted on."""
    observed_restart: str | None = None
    """Last value of the annotation mlx-operator.dev/restart that was acted on."""
    history: Annotated[tuple[GroupFailure, ...], Field(max_length=MAX_HISTORY)] = ()
    """Last failures of the group, newest first."""
    runners: Annotated[
        tuple[RunnerStatus, ...],
        Field(max_length=MAX_RUNNERS, json_schema_extra={_LIST_MAP: "map", _LIST_KEYS: ["rank"]}),
    ] = ()
    """Every rank."""
    conditions: Annotated[
        tuple[Condition, ...], Field(max_length=16, json_schema_extra={_LIST_MAP: "map", _LIST_KEYS: ["type"]})
    ] = ()
    """Ready, Reconciling, Stalled, and what they follow from."""

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of a type, or None before the first pass."""
        for condition in self.conditions:
            if condition.type is kind:
                return condition
        return None

    def runner(self, rank: int) -> RunnerStatus:
        """The entry of a rank; an empty one where there is none yet."""
        for runner in self.runners:
            if runner.rank == rank:
                return runner
        return RunnerStatus(rank=rank)
