"""What the store keeps of an object: thousands of pods lie in memory, and most of a pod is of no use to a decision."""

import sys
from collections.abc import Mapping
from typing import Any

_Manifest = Mapping[str, Any]
_SHARED_LENGTH = 64
"""Longest text of which one copy is kept for all objects; words, times and ids are shorter, messages are not."""
_POD_SPEC = frozenset({"affinity", "imagePullSecrets", "securityContext", "tolerations", "topologySpreadConstraints"})
_CONTAINER = frozenset(
    {"env", "lifecycle", "livenessProbe", "ports", "readinessProbe", "securityContext", "startupProbe", "volumeMounts"}
)
_NODE_STATUS = frozenset({"images", "volumesAttached", "volumesInUse"})


def slim(item: _Manifest) -> dict[str, Any]:
    """Without `metadata.managedFields`, which is half of an object and of no use here."""
    return {**_shared(item, {"metadata"}), "metadata": _shared(item["metadata"], {"managedFields"})}


def slim_pod(pod: _Manifest) -> dict[str, Any]:
    """The same, and without what we said ourselves of how its container runs: nothing is decided from that."""
    kept = slim({key: value for key, value in pod.items() if key != "spec"})
    spec = pod.get("spec")
    if spec is not None:
        containers = [_shared(container, _CONTAINER) for container in spec.get("containers") or ()]
        kept["spec"] = {**_shared(spec, _POD_SPEC | {"containers"}), "containers": containers}
    return kept


def slim_node(node: _Manifest) -> dict[str, Any]:
    """The same, and without the images that lie on it."""
    status = node.get("status")
    return slim(node if status is None else {**node, "status": _shared(status, _NODE_STATUS)})


def _shared(mapping: _Manifest, without: frozenset[str] | set[str]) -> dict[str, Any]:
    return {sys.intern(key): _one_copy(value) for key, value in mapping.items() if key not in without}


def _one_copy(value: Any) -> Any:
    """Equal, with short texts shared: JSON is decoded into new strings for each object, keys included."""
    if isinstance(value, dict):
        return {sys.intern(key): _one_copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_one_copy(inner) for inner in value]
    return sys.intern(value) if isinstance(value, str) and len(value) <= _SHARED_LENGTH else value
