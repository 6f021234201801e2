"""`spec.runner`: the pod of each rank, as users write it, with the rules that a pod would be refused by."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from .base import Lenient
from .cel import cel, rules
from .fields import (
    ANNOTATION_KEY,
    DEVICE,
    KEY_HELP,
    LABEL_KEY,
    AnnotationValue,
    EnvName,
    Image,
    LabelValue,
    Name,
    Opaque,
    Quantity,
    TaintKey,
)
from .names import GROUP

_MAP_BY_NAME = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
RESERVED_LABELS = tuple(
    f"app.kubernetes.io/{name}" for name in ("name", "instance", "component", "part-of", "managed-by")
)
"""Labels of the pods that the operator sets itself, besides all under its own group."""


class LocalReference(Lenient):
    """An object in the same namespace."""

    name: Name
    """Its name."""


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
