"""The pod of a rank, and the hash that says when a pod has to be replaced.

The hash is over what the user asked for, not over the rendered manifest: an upgrade of the operator that renders a pod
differently restarts no model. `TEMPLATE_VERSION` is raised only where running pods must not stay.
"""

import math
from collections.abc import Mapping
from typing import Any

from mlx_operator_api import names
from mlx_operator_api.deadlines import OPERATOR_GRACE_SECONDS
from mlx_operator_api.modelinstance import KeyReference
from mlx_operator_api.runner_pod import Runner
from mlx_operator_api.sizes import quantity
from mlx_operator_api.source import Source, SourceKind

from .observed import Settings
from .spec import Wanted, digest

TEMPLATE_VERSION = 1
USER = 65532
"""The `nonroot` user of the runner image."""
MIN_GRACE_SECONDS = 30
TOLERATION_SECONDS = 30
_NODE_TAINTS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
_CHOSEN, _DEFAULT = "chosen", "default"


def image(wanted: Wanted, settings: Settings, fixed: str | None, known_hash: str | None) -> str:
    """The runner image: the spec's; else the one that was fixed at the first pod; else the operator's default.

    `known_hash` tells whether the fixed one came from a spec that no longer names it.
    """
    runner = wanted.spec.runner
    if runner is not None and runner.image:
        return runner.image
    was_chosen = known_hash is not None and known_hash.startswith(_CHOSEN)
    return settings.runner_image if fixed is None or was_chosen else fixed


def template_hash(wanted: Wanted, image: str, settings: Settings) -> str:
    """Hash of all that a pod is made of, the rank aside; it also tells whether the image was chosen in the spec."""
    known, key = wanted.template_hashes, (image, settings.key_id)
    if key not in known:
        known[key] = _template_hash(wanted, image, settings)
    return known[key]


def _template_hash(wanted: Wanted, image: str, settings: Settings) -> str:
    runner = wanted.spec.runner or Runner()
    inputs: dict[str, Any] = {
        "version": TEMPLATE_VERSION,
        "image": image,
        "runner": runner.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"image"}),
        "source": _mounted(wanted.source),
        "cache": wanted.spec.cache and wanted.spec.cache.model_dump(mode="json", by_alias=True, exclude_none=True),
        "grace": grace_seconds(wanted),
        "key": settings.key_id,
    }
    if (secret := _credentials(wanted)) is not None:
        inputs["credentials"] = secret
    if wanted.adapter is not None:
        inputs["adapter"] = _mounted(wanted.adapter)
    if (reference := _api_keys(wanted)) is not None:
        inputs["apiKeys"] = reference.model_dump(mode="json", by_alias=True, exclude_none=True)
    return f"{_CHOSEN if runner.image else _DEFAULT}-{digest(inputs)}"


def _mounted(source: Source) -> list[str]:
    """hf:// to hf:// and another path in one claim need no other pod: the runner resolves them."""
    return [source.kind, "" if source.kind is SourceKind.HUB else source.name]


def _api_keys(wanted: Wanted) -> KeyReference | None:
    return wanted.spec.serving.api_key_secret_ref if wanted.spec.serving else None


def grace_seconds(wanted: Wanted) -> int:
    """Time a pod has to drain: the runner's own shutdown deadline and a margin."""
    return max(MIN_GRACE_SECONDS, math.ceil(wanted.deadlines.of("shutdown") + OPERATOR_GRACE_SECONDS))


def labels(wanted: Wanted, rank: int | None = None) -> dict[str, str]:
    """Labels of a child."""
    return {
        "app.kubernetes.io/name": "mlx-runner",
        "app.kubernetes.io/instance": wanted.name,
        "app.kubernetes.io/component": "runner",
        "app.kubernetes.io/part-of": "mlx-operator",
        "app.kubernetes.io/managed-by": "mlx-operator",
        names.INSTANCE_LABEL: wanted.name,
        names.INSTANCE_UID_LABEL: wanted.uid,
        **({} if rank is None else {names.RANK_LABEL: str(rank)}),
    }


def owner(wanted: Wanted) -> list[dict[str, Any]]:
    """The reference by which a child is collected with its ModelInstance."""
    return [
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": wanted.name,
            "uid": wanted.uid,
            "controller": True,
            # Needs no permission on finalizers where OwnerReferencesPermissionEnforcement is on.
            "blockOwnerDeletion": False,
        }
    ]


def pod(wanted: Wanted, rank: int, image: str, settings: Settings) -> dict[str, Any]:
    """Manifest of the pod of a rank."""
    runner = wanted.spec.runner or Runner()
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": names.pod_name(wanted.name, rank),
            "namespace": wanted.namespace,
            "labels": {**(runner.pod_labels or {}), **labels(wanted, rank)},
            "annotations": {
                **(runner.pod_annotations or {}),
                names.TEMPLATE_HASH_ANNOTATION: template_hash(wanted, image, settings),
            },
            "ownerReferences": owner(wanted),
        },
        "spec": {
            "restartPolicy": "Always",
            "terminationGracePeriodSeconds": grace_seconds(wanted),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "tolerations": _tolerations(runner),
            "containers": [_container(wanted, rank, image, settings)],
            "volumes": [*_volumes(wanted, settings), *(_api_key_volumes(wanted) if rank == 0 else ())],
            **_placement(runner),
        },
    }


def _placement(runner: Runner) -> dict[str, Any]:
    fields = {
        "nodeSelector": runner.node_selector,
        "affinity": runner.affinity,
        "topologySpreadConstraints": _list(runner.topology_spread_constraints),
        "priorityClassName": runner.priority_class_name,
        "runtimeClassName": runner.runtime_class_name,
        "serviceAccountName": runner.service_account_name,
        "imagePullSecrets": runner.image_pull_secrets and [{"name": s.name} for s in runner.image_pull_secrets],
    }
    return {name: value for name, value in fields.items() if value}


def _list(values: tuple[dict[str, Any], ...] | None) -> list[dict[str, Any]] | None:
    return None if values is None else list(values)


def _tolerations(runner: Runner) -> list[dict[str, Any]]:
    chosen = [t.model_dump(mode="json", by_alias=True, exclude_none=True) for t in runner.tolerations or ()]
    ours = [
        {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS}
        for taint in _NODE_TAINTS
        if not any(_covers(t, taint) for t in chosen)
    ]
    return [*chosen, *ours]


def _covers(toleration: Mapping[str, Any], taint: str) -> bool:
    return toleration.get("key") in (None, taint) and toleration.get("effect") in (None, "NoExecute")


def _container(wanted: Wanted, rank: int, image: str, settings: Settings) -> dict[str, Any]:
    runner = wanted.spec.runner or Runner()
    resources = runner.resources
    container: dict[str, Any] = {
        "name": names.CONTAINER,
        "image": image,
        "env": _environment(wanted, rank, runner),
        "ports": [
            {"name": "http", "containerPort": names.PUBLIC_PORT, "protocol": "TCP"},
            {"name": "control", "containerPort": names.CONTROL_PORT, "protocol": "TCP"},
            {"name": "frames", "containerPort": names.FRAME_PORT, "protocol": "TCP"},
        ],
        "readinessProbe": {**_probe("/readyz"), "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 2},
        # The supervisor answers whatever its engine does; only a dead event loop may cost a restart.
        "livenessProbe": {**_probe("/healthz"), "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(wanted, rank),
    }
    if resources is not None:
        container["resources"] = resources.model_dump(mode="json", by_alias=True, exclude_none=True)
    if settings.image_pull_policy:
        container["imagePullPolicy"] = settings.image_pull_policy
    return container


def _probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": names.CONTROL_PORT}}


def _environment(wanted: Wanted, rank: int, runner: Runner) -> list[dict[str, Any]]:
    ours: list[dict[str, Any]] = [
        {"name": names.ENV_INSTANCE, "value": wanted.name},
        {"name": names.ENV_NAMESPACE, "value": wanted.namespace},
        {"name": names.ENV_UID, "value": wanted.uid},
        {"name": names.ENV_RANK, "value": str(rank)},
        {"name": names.ENV_GRACE, "value": str(grace_seconds(wanted))},
        _downward(names.ENV_POD_NAME, "metadata.name"),
        _downward(names.ENV_POD_UID, "metadata.uid"),
        _downward(names.ENV_POD_IP, "status.podIP"),
        _downward(names.ENV_NODE_NAME, "spec.nodeName"),
        *_download(wanted),
    ]
    if rank == 0 and _api_keys(wanted) is not None:
        ours.append({"name": names.ENV_API_KEY_FILE, "value": f"{names.API_KEY_MOUNT}/{names.API_KEY}"})
    taken = {variable["name"] for variable in ours}
    chosen = [v.model_dump(mode="json", by_alias=True, exclude_none=True) for v in runner.env or ()]
    return [*ours, *(variable for variable in chosen if variable["name"] not in taken)]


def field_of_variable(wanted: Wanted, rank: int, place: int) -> str:
    """The field of the spec that a variable of the container's environment comes from."""
    runner = wanted.spec.runner or Runner()
    names_in_order = [variable["name"] for variable in _environment(wanted, rank, runner)]
    name = names_in_order[place] if place < len(names_in_order) else None
    if name == names.HUB_TOKEN_ENV and _credentials(wanted) is not None:
        return "spec.model.credentialsSecretRef"
    chosen = [variable.name for variable in runner.env or ()]
    return f"spec.runner.env[{chosen.index(name)}]" if name in chosen else "spec.runner.env"


def _download(wanted: Wanted) -> list[dict[str, Any]]:
    """What a download needs to know that a task does not tell."""
    found: list[dict[str, Any]] = []
    if (secret := _credentials(wanted)) is not None:
        reference = {"name": secret, "key": names.HUB_TOKEN_KEY}
        found.append({"name": names.HUB_TOKEN_ENV, "valueFrom": {"secretKeyRef": reference}})
    cache = wanted.spec.cache
    if cache is not None and cache.size_limit is not None and not cache.claim_name:
        found.append({"name": names.ENV_CACHE_BYTES, "value": str(quantity(cache.size_limit))})
    return found


def _credentials(wanted: Wanted) -> str | None:
    """The Secret with the hub's token; other sources have no use for it."""
    reference = wanted.spec.model.credentials_secret_ref
    return reference.name if reference is not None and wanted.from_hub else None


def _downward(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _mounts(wanted: Wanted, rank: int) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "state", "mountPath": names.STATE_MOUNT},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 (an emptyDir of the pod's own)
        {"name": "token", "mountPath": names.TOKEN_MOUNT, "readOnly": True},
        {"name": "cache", "mountPath": names.CACHE_MOUNT},
    ]
    if wanted.source.kind is not SourceKind.HUB:
        mounts.append({"name": "model", "mountPath": names.MODEL_MOUNT, "readOnly": True})
    if wanted.adapter is not None and wanted.adapter.kind is not SourceKind.HUB:
        mounts.append({"name": "adapter", "mountPath": names.ADAPTER_MOUNT, "readOnly": True})
    if rank == 0 and _api_keys(wanted) is not None:
        mounts.append({"name": "api-keys", "mountPath": names.API_KEY_MOUNT, "readOnly": True})
    return mounts


def _volumes(wanted: Wanted, settings: Settings) -> list[dict[str, Any]]:
    secret = names.secret_name(wanted.name, wanted.uid, settings.key_id)
    volumes: list[dict[str, Any]] = [
        {"name": "state", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "token", "secret": {"secretName": secret, "defaultMode": 0o440}},
        {"name": "cache", **_cache(wanted)},
    ]
    for name, source in (("model", wanted.source), ("adapter", wanted.adapter)):
        if source is not None and source.kind is not SourceKind.HUB:
            volumes.append({"name": name, **_source(source, settings)})
    return volumes


def _source(source: Source, settings: Settings) -> dict[str, Any]:
    """What is mounted of a claim or an image."""
    if source.kind is SourceKind.CLAIM:
        return {"persistentVolumeClaim": {"claimName": source.name, "readOnly": True}}
    reference: dict[str, Any] = {"reference": source.name}
    if settings.image_pull_policy:
        reference["pullPolicy"] = settings.image_pull_policy
    return {"image": reference}


def _api_key_volumes(wanted: Wanted) -> list[dict[str, Any]]:
    """Only rank 0 has clients. A whole volume: a single file in it would not follow changes of the Secret."""
    reference = _api_keys(wanted)
    if reference is None:
        return []
    items = [{"key": reference.key or names.API_KEY, "path": names.API_KEY}]
    return [{"name": "api-keys", "secret": {"secretName": reference.name, "items": items, "defaultMode": 0o440}}]


def _cache(wanted: Wanted) -> dict[str, Any]:
    cache = wanted.spec.cache
    if cache is not None and cache.claim_name:
        return {"persistentVolumeClaim": {"claimName": cache.claim_name}}
    if cache is not None and cache.size_limit is not None:
        return {"emptyDir": {"sizeLimit": cache.size_limit}}
    return {"emptyDir": {}}
