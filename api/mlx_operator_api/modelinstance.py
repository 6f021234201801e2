"""ModelInstance v1alpha1: the spec as users write it, with every default in one place.

The models are the source of truth; `crd.py` generates the schema. Defaults are not in the schema (the API server
would write them into users' objects): they are the `DEFAULT_*` values and the methods here.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from .base import Lenient, seconds
from .cel import cel, rules
from .fields import (
    ANNOTATION_KEY,
    DEVICE,
    DURATION_RULE,
    KEY_HELP,
    LABEL_KEY,
    AnnotationValue,
    Duration,
    EnvName,
    Image,
    LabelValue,
    ModelSource,
    Name,
    Opaque,
    Quantity,
    SecretKey,
    ServedName,
    TaintKey,
)
from .names import GROUP, MAX_NAME_LENGTH, MAX_RUNNERS
from .status import Status
from .tasks import DeadlineSeconds, ServingOptions, Sharding

_MAP_BY_NAME = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
RESERVED_LABELS = tuple(
    f"app.kubernetes.io/{name}" for name in ("name", "instance", "component", "part-of", "managed-by")
)
"""Labels of the pods that the operator sets itself, besides all under its own group."""


class LocalReference(Lenient):
    """An object in the same namespace."""

    name: Name
    """Its name."""


class Adapter(Lenient):
    """A low-rank adapter of the model, in mlx-lm's form: adapter_config.json and adapters.safetensors."""

    source: ModelSource
    """Where it is: `hf://ORG/NAME[@REV]`, `pvc://CLAIM/PATH` or `oci://IMAGE` (an image volume). Resolved and verified
    as the model is; the commit of a hub's repository is in status.model.adapter.revision."""


class KeyReference(LocalReference):
    """A key of a Secret in the same namespace."""

    key: SecretKey | None = None
    """Default: api-key."""


class Model(Lenient):
    """The model to serve."""

    source: ModelSource
    """Where the weights come from: `hf://ORG/NAME[@REV]`, `pvc://CLAIM/PATH` or `oci://IMAGE` (an image volume). A
    branch of a hub's repository is resolved once, to the commit in status.model.revision: again when the spec changes
    or with the annotation mlx-operator.dev/restart. HF_ENDPOINT in spec.runner.env names a mirror."""
    credentials_secret_ref: LocalReference | None = None
    """Secret with the key `token`, for private or gated `hf://` repositories of model and adapter: HF_TOKEN of the
    runner container, before one of spec.runner.env. No effect with pvc:// and oci://."""
    adapter: Adapter | None = None
    """Fused into the weights when they are loaded. Default: none."""
    served_name: ServedName | None = None
    """The name clients put into `model`. Default: metadata.name."""


class Toleration(Lenient):
    """A toleration of the pods, as in a pod spec."""

    # The API server would refuse such a pod: better to say so when the ModelInstance is applied.
    model_config = ConfigDict(
        json_schema_extra=rules(
            cel(
                rule="has(self.key) || (has(self.operator) && self.operator == 'Exists')",
                message="a toleration without key matches every taint: say so with operator: Exists, or name a key",
            ),
            cel(
                rule="!has(self.value) || !has(self.operator) || self.operator != 'Exists'",
                message="operator Exists takes no value: remove value, or use operator: Equal",
                field_path=".value",
            ),
            cel(
                rule="!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
                message="tolerationSeconds needs effect: NoExecute",
                field_path=".tolerationSeconds",
            ),
        )
    )

    key: TaintKey | None = None
    """Taint key; absent with operator Exists matches all."""
    operator: Annotated[str | None, Field(json_schema_extra={"enum": ["Exists", "Equal", "Lt", "Gt"]})] = None
    """How the value is compared. Default: Equal. Lt and Gt need a cluster that has them."""
    value: LabelValue | None = None
    """Taint value; none with Exists."""
    effect: Annotated[
        str | None, Field(json_schema_extra={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]})
    ] = None
    """Effect of the taint; absent matches all."""
    toleration_seconds: Annotated[int | None, Field(json_schema_extra={"format": "int64"})] = None
    """How long a NoExecute taint is tolerated; absent: for ever."""


class EnvVar(Lenient):
    """An environment variable of the runner container."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule="!has(self.value) || !has(self.valueFrom)",
            message="value and valueFrom exclude each other: remove one",
        )
    )

    name: EnvName
    """Its name."""
    value: Annotated[str | None, Field(max_length=32768)] = None
    """Its value."""
    value_from: Opaque | None = None
    """A source for its value, as in a pod spec."""


def _keys_rule(good: str, complaint: str) -> dict[str, Any]:
    """A rule on the keys of a map; the message starts with the bad ones."""
    return cel(
        rule=f"self.all(key, {good})",
        message=complaint,
        expression=f"self.filter(key, !({good}))[0] + ': {complaint}'",
    )


_RESOURCE_NAMES = _keys_rule(
    f"key.matches('{DEVICE}') || key.startsWith('hugepages-') || key in ['cpu', 'memory', 'ephemeral-storage']",
    "unknown resource: use cpu, memory, ephemeral-storage, hugepages-SIZE or one with a domain such as nvidia.com/gpu",
)
ResourceList = Annotated[dict[str, Quantity], Field(max_length=16, json_schema_extra=_RESOURCE_NAMES)]


class Resources(Lenient):
    """Requests and limits of the runner container."""

    limits: ResourceList | None = None
    """Most it may use. The memory limit is checked against the shard before loading."""
    requests: ResourceList | None = None
    """What the scheduler reserves."""


_LABEL_KEYS = _keys_rule(f"key.matches('{LABEL_KEY}')", f"no key of a label: {KEY_HELP}")
_POD_LABELS = rules(
    _LABEL_KEYS,
    _keys_rule(
        f"!key.startsWith('{GROUP}/') && !(key in {list(RESERVED_LABELS)})",
        "the operator sets this label itself: remove it, or use a domain of your own",
    ),
)
_POD_ANNOTATIONS = rules(
    _keys_rule(f"key.matches('{ANNOTATION_KEY}')", f"no key of an annotation: {KEY_HELP}"),
    _keys_rule(
        f"!key.startsWith('{GROUP}/')",
        "the operator sets this annotation itself: remove it, or use a domain of your own",
    ),
)


class Runner(Lenient):
    """The pod of each rank."""

    image: Image | None = None
    """Image of the runner. Default: the operator's own release, fixed in status.runnerImage at the first pod."""
    resources: Resources | None = None
    """Requests and limits of the runner container."""
    node_selector: Annotated[dict[str, LabelValue] | None, Field(max_length=64, json_schema_extra=_LABEL_KEYS)] = None
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
    image_pull_secrets: Annotated[
        tuple[LocalReference, ...] | None, Field(max_length=16, json_schema_extra=_MAP_BY_NAME)
    ] = None
    """Secrets for pulling the image."""
    service_account_name: Name | None = None
    """Service account of the pods; no token is mounted."""
    pod_labels: Annotated[dict[str, LabelValue] | None, Field(max_length=64, json_schema_extra=_POD_LABELS)] = None
    """More labels of the pods; not those that the operator sets itself."""
    pod_annotations: Annotated[
        dict[str, AnnotationValue] | None, Field(max_length=64, json_schema_extra=_POD_ANNOTATIONS)
    ] = None
    """More annotations of the pods; not those that the operator sets itself."""


class Cache(Lenient):
    """Where downloads are kept."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule="!has(self.claimName) || !has(self.sizeLimit)",
            message="sizeLimit limits the emptyDir, which claimName replaces: remove claimName or sizeLimit",
        )
    )

    claim_name: Name | None = None
    """A PersistentVolumeClaim, shared by instances and kept over restarts, in the layout of the Hugging Face hub's own
    cache. Default: an emptyDir per pod."""
    size_limit: Quantity | None = None
    """Size limit of the emptyDir; not together with claimName. A model that does not fit is told before it is
    fetched."""


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
    """Memory of each runner for the keys and values of finished requests, so that a prompt that begins like one of them
    is computed only from where they differ; 0 turns it off. Default: a sixteenth of the runner's memory limit, at most
    1 GiB; 256 MiB without a limit."""
    api_key_secret_ref: KeyReference | None = None
    """Secret with the API keys, one a line, of which clients must send one as a bearer token. Changes of the Secret are
    followed without a restart. Default: whoever reaches the Service may use the model."""

    def options(self) -> ServingOptions:
        """With defaults, as the runner gets them."""
        default = ServingOptions()
        return ServingOptions(
            max_concurrent_requests=self.max_concurrent_requests or default.max_concurrent_requests,
            max_queue=default.max_queue if self.max_queue is None else self.max_queue,
            max_tokens=self.max_tokens,
            context_length=self.context_length,
            prompt_cache_bytes=self.prompt_cache_bytes,
        )


class Deadlines(Lenient):
    """How long each step may take."""

    schedule: Duration | None = None
    """A pod is placed. Default: 10m."""
    pull: Duration | None = None
    """A placed pod's container runs. Default: 10m."""
    unreachable: Duration | None = None
    """A supervisor that was reached says something again. It has a word every 2 s, and its connection is given up after
    4.5 s without one: less than that counts as that. Default: 8s."""
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
    resume: Duration | None = None
    """Requests of clients are held while the group restarts; then they get an error. Default: 1m."""

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
    "unreachable": "8s",
    "download": "1h",
    "connect": "40s",
    "load": "10m",
    "warmup": "5m",
    "progress": "2m",
    "shutdown": "30s",
    "resume": "1m",
}
OPERATOR_GRACE_SECONDS = 10.0
"""The operator waits this much longer than the supervisor's own deadline before it acts itself."""


DEFAULT_BACKOFF_INITIAL = "2s"
DEFAULT_BACKOFF_MAX = "5m"


class Backoff(Lenient):
    """Time before a restart. The first restart of a window is at once."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule=f"!has(self.initial) || !self.initial.matches('{DURATION_RULE}') "
            f"|| (has(self.max) && !self.max.matches('{DURATION_RULE}')) "
            f"|| duration(self.initial) <= duration(has(self.max) ? self.max : '{DEFAULT_BACKOFF_MAX}')",
            message=f"initial is longer than max (default {DEFAULT_BACKOFF_MAX}): lower initial or raise max",
            expression="'initial ' + self.initial + ' is longer than max ' "
            f"+ (has(self.max) ? self.max : '{DEFAULT_BACKOFF_MAX} (the default)') + ': lower initial or raise max'",
        )
    )

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


NAME_RULES = rules(
    cel(
        rule=f"size(self.metadata.name) <= {MAX_NAME_LENGTH}",
        message=f"metadata.name must have at most {MAX_NAME_LENGTH} characters: the pods are called NAME-RANK",
        field_path=".metadata.name",
    ),
    cel(
        rule="self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        message="metadata.name must start with a letter and hold only a-z, 0-9 and -: the Service is called NAME",
        field_path=".metadata.name",
    ),
)
"""Rules on the root of the object, the only place where CEL sees the name."""
