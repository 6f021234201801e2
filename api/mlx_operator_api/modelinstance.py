"""ModelInstance v1alpha1: the spec as users write it, with every default in one place.

The models are the source of truth; `crd.py` generates the schema. Defaults are not in the schema (the API server
would write them into users' objects): they are the `DEFAULT_*` values and the methods here.
"""

from typing import Annotated

from pydantic import ConfigDict, Field

from .base import Lenient
from .cel import cel, rules
from .deadlines import Deadlines
from .fields import (
    ModelSource,
    Name,
    Quantity,
    SecretKey,
    ServedName,
)
from .names import MAX_NAME_LENGTH, MAX_RUNNERS
from .restart_policy import RestartPolicy
from .runner_pod import LocalReference, Runner
from .status import Status
from .tasks import ServingOptions, Sharding


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
