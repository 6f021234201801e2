"""ModelInstance v1alpha1: the spec as users write it, with every default in one place.

The models are the source of truth; `crd.py` generates the schema. Defaults are not in the schema (the API server
would write them into users' objects): they are the `DEFAULT_*` values and the methods here.
"""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from .base import DURATION_PATTERN, Lenient, seconds
from .cel import cel
from .names import MAX_NAME_LENGTH, MAX_RUNNERS
from .source import SCHEMES
from .status import Status
from .tasks import DeadlineSeconds, ServingOptions, Sharding

_MAP_BY_NAME = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}

Duration = Annotated[
    str,
    Field(
        max_length=32,
        json_schema_extra=cel(
            rule=f"self.matches('{DURATION_PATTERN}')",
            message="write a number with a unit (ms, s, m, h), for example 90s or 10m",
            expression="self + ' is no duration: write a number with a unit (ms, s, m, h), for example 90s or 10m'",
        ),
    ),
]
Quantity = Annotated[
    str | int,
    WithJsonSchema({"x-kubernetes-int-or-string": True}),
]
Opaque = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})]
Name = Annotated[str, Field(min_length=1, max_length=253)]


class LocalReference(Lenient):
    """An object in the same namespace."""

    name: Name
    """Its name."""


class Model(Lenient):
    """The model to serve."""

    source: Annotated[
        str,
        Field(
            min_length=1,
            max_length=2048,
            json_schema_extra=cel(
                rule="self.matches('^(hf|pvc|oci)://[^/].*$')",
                message=f"use {SCHEMES}",
                expression=f"'unsupported model source ' + self + ': use {SCHEMES}'",
            ),
        ),
    ]
    """Where the weights come from: `hf://ORG/NAME[@REV]`, `pvc://CLAIM/PATH` or `oci://IMAGE` (an image volume)."""
    credentials_secret_ref: LocalReference | None = None
    """Secret with the key `token`, for a private or gated repository."""
    served_name: Annotated[str | None, Field(min_length=1, max_length=253)] = None
    """The name clients put into `model`. Default: metadata.name."""


class Toleration(Lenient):
    """A toleration of the pods, as in a pod spec."""

    key: Annotated[str | None, Field(max_length=316)] = None
    """Taint key; empty with operator Exists matches all."""
    operator: Annotated[str | None, Field(max_length=16)] = None
    """Exists or Equal. Default: Equal."""
    value: Annotated[str | None, Field(max_length=63)] = None
    """Taint value, with Equal."""
    effect: Annotated[str | None, Field(max_length=32)] = None
    """NoSchedule, PreferNoSchedule or NoExecute; empty matches all."""
    toleration_seconds: int | None = None
    """How long a NoExecute taint is tolerated."""


class EnvVar(Lenient):
    """An environment variable of the runner container."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    """Its name."""
    value: Annotated[str | None, Field(max_length=32768)] = None
    """Its value."""
    value_from: Opaque | None = None
    """A source for its value, as in a pod spec."""


class Resources(Lenient):
    """Requests and limits of the runner container."""

    limits: Annotated[dict[str, Quantity] | None, Field(max_length=16)] = None
    """Most it may use. The memory limit is checked against the shard before loading."""
    requests: Annotated[dict[str, Quantity] | None, Field(max_length=16)] = None
    """What the scheduler reserves."""


class Runner(Lenient):
    """The pod of each rank."""

    image: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    """Image of the runner. Default: the operator's own release, fixed in status.runnerImage at the first pod."""
    resources: Resources | None = None
    """Requests and limits of the runner container."""
    node_selector: Annotated[dict[str, str] | None, Field(max_length=64)] = None
    """Labels that the node must have."""
    tolerations: Annotated[tuple[Toleration, ...] | None, Field(max_length=64)] = None
    """Taints that are tolerated. not-ready and unreachable are tolerated for 30 s unless said otherwise here."""
    affinity: Opaque | None = None
    """Affinity, as in a pod spec."""
    topology_spread_constraints: Annotated[tuple[Opaque, ...] | None, Field(max_length=16)] = None
    """Spread over nodes or zones, as in a pod spec."""
    priority_class_name: Name | None = None
    """Priority of the pods."""
    runtime_class_name: Name | None = None
    """Container runtime of the pods."""
    env: Annotated[tuple[EnvVar, ...] | None, Field(max_length=256, json_schema_extra=_MAP_BY_NAME)] = None
    """Environment of the runner container."""
    image_pull_secrets: Annotated[tuple[LocalReference, ...] | None, Field(max_length=16)] = None
    """Secrets for pulling the image."""
    service_account_name: Name | None = None
    """Service account of the pods; no token is mounted."""
    pod_labels: Annotated[dict[str, str] | None, Field(max_length=64)] = None
    """More labels of the pods."""
    pod_annotations: Annotated[dict[str, str] | None, Field(max_length=64)] = None
    """More annotations of the pods."""


class Cache(Lenient):
    """Where downloads are kept."""

    claim_name: Name | None = None
    """A PersistentVolumeClaim, shared by instances and kept over restarts. Default: an emptyDir per pod."""
    size_limit: Quantity | None = None
    """Size limit of the emptyDir."""


class Serving(Lenient):
    """Limits of the public API."""

    max_concurrent_requests: Annotated[int | None, Field(ge=1, le=4096)] = None
    """Requests in work at once. Default: 16."""
    max_queue: Annotated[int | None, Field(ge=0, le=65536)] = None
    """Requests that may wait; more are answered 429. Default: 64."""
    max_tokens: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    """Upper bound, and default, of max_tokens of one request. Default: what fits into the context."""
    context_length: Annotated[int | None, Field(ge=1, le=100_000_000)] = None
    """Tokens of prompt and answer together. Default: the model's own."""
    prompt_cache_bytes: Annotated[int | None, Field(ge=0, json_schema_extra={"format": "int64"})] = None
    """Memory for reusing prompts. Not used by this release."""
    api_key_secret_ref: LocalReference | None = None
    """Secret whose key `apiKey` clients must send as a bearer token. Not used by this release."""

    def options(self) -> ServingOptions:
        """With defaults, as the runner gets them."""
        default = ServingOptions()
        return ServingOptions(
            max_concurrent_requests=self.max_concurrent_requests or default.max_concurrent_requests,
            max_queue=default.max_queue if self.max_queue is None else self.max_queue,
            max_tokens=self.max_tokens,
            context_length=self.context_length,
        )


class Deadlines(Lenient):
    """How long each step may take."""

    schedule: Duration | None = None
    """A pod is placed. Default: 10m."""
    pull: Duration | None = None
    """A placed pod's container runs. Default: 10m."""
    unreachable: Duration | None = None
    """A supervisor that was reached answers again. Default: 15s."""
    download: Duration | None = None
    """The files are present and verified. Default: 1h."""
    connect: Duration | None = None
    """The group is formed. Default: 40s."""
    load: Duration | None = None
    """The shard is loaded. Default: 10m."""
    warmup: Duration | None = None
    """The warm-up is done. Default: 5m."""
    progress: Duration | None = None
    """One step of the engine, while it has work. Default: 2m."""
    shutdown: Duration | None = None
    """Running requests finish. Default: 30s."""

    def of(self, name: str) -> float:
        """Seconds of one deadline, with its default.

        Raises:
            ValueError: the stored text is no duration (only past the CRD's validation).
        """
        text = getattr(self, name) or DEFAULT_DEADLINES[name]
        try:
            return seconds(text)
        except ValueError as error:
            raise ValueError(f"spec.deadlines.{name}: {error}") from error

    def for_runner(self) -> DeadlineSeconds:
        """Those that the supervisor keeps."""
        return DeadlineSeconds(**{name: self.of(name) for name in DeadlineSeconds.model_fields})


DEFAULT_DEADLINES = {
    "schedule": "10m",
    "pull": "10m",
    "unreachable": "15s",
    "download": "1h",
    "connect": "40s",
    "load": "10m",
    "warmup": "5m",
    "progress": "2m",
    "shutdown": "30s",
}
OPERATOR_GRACE_SECONDS = 10.0
"""The operator waits this much longer than the supervisor's own deadline before it acts itself."""


class Backoff(Lenient):
    """Time before a restart. The first restart of a window is at once."""

    initial: Duration | None = None
    """Of the second restart. Default: 2s. Doubles with each further one."""
    max: Duration | None = None
    """Upper bound. Default: 5m."""


class RestartPolicy(Lenient):
    """What happens after a failure."""

    max_restarts: Annotated[int | None, Field(ge=0, le=1000)] = None
    """Failures in a window before the group is Stalled. Default: 5."""
    backoff: Backoff | None = None
    """Time before a restart."""
    reset_after: Duration | None = None
    """Ready for this long: the budget is full again. Default: 10m."""


DEFAULT_MAX_RESTARTS = 5
DEFAULT_BACKOFF_INITIAL = "2s"
DEFAULT_BACKOFF_MAX = "5m"
DEFAULT_RESET_AFTER = "10m"


class Spec(Lenient):
    """Desired state: which model, over how many runners, and how its pods look."""

    model: Model
    """The model to serve."""
    runners: Annotated[int | None, Field(ge=1, le=MAX_RUNNERS)] = None
    """Number of runners, one pod each (the world size). Default: 1."""
    sharding: Sharding | None = None
    """Pipeline splits by whole layers, Tensor inside each layer. Default: Pipeline. Ignored at one runner."""
    runner: Runner | None = None
    """The pod of each rank."""
    cache: Cache | None = None
    """Where downloads are kept."""
    serving: Serving | None = None
    """Limits of the public API."""
    deadlines: Deadlines | None = None
    """How long each step may take."""
    restart_policy: RestartPolicy | None = None
    """What happens after a failure."""
    suspend: bool | None = None
    """True removes the pods and keeps the object, its Service, its Secret and its history."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.runners or 1


class ModelInstance(Lenient):
    """One served model: a Service, and one pod for each rank."""

    spec: Spec
    """Desired state: which model, over how many runners, and how its pods look."""
    status: Status | None = None
    """Observed state, written by the operator."""


NAME_RULE = cel(
    rule=f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
    message=f"metadata.name must have at most {MAX_NAME_LENGTH} characters: the pods are called NAME-RANK",
    field_path=".metadata.name",
)
"""A rule on the root of the object."""
