"""The client Service: one port, to rank 0."""

from collections.abc import Mapping
from typing import Any

from mlx_operator_api import names

from .observed import Manifest
from .spec import Wanted
from .template import labels, owner


def manifest(wanted: Wanted) -> dict[str, Any]:
    """The Service as it should be."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": names.service_name(wanted.name),
            "namespace": wanted.namespace,
            "labels": labels(wanted),
            "ownerReferences": owner(wanted),
        },
        "spec": {
            "selector": {names.INSTANCE_LABEL: wanted.name, names.RANK_LABEL: "0"},
            "ports": [
                {
                    "name": "http",
                    "port": names.PUBLIC_PORT,
                    "targetPort": names.PUBLIC_PORT,
                    "protocol": "TCP",
                    "appProtocol": "http",
                }
            ],
        },
    }


def ours(found: Manifest, wanted: Wanted) -> bool:
    """Whether the object with our Service's name belongs to this ModelInstance."""
    references = found["metadata"].get("ownerReferences") or ()
    return any(reference.get("uid") == wanted.uid for reference in references)


def differs(found: Manifest, wanted: Wanted) -> bool:
    """Whether anything that we set is not so; what others added or the server filled in is left alone."""
    desired = manifest(wanted)
    return not (
        _contains(found["metadata"].get("labels"), desired["metadata"]["labels"])
        and _contains(found.get("spec"), desired["spec"])
        and found["spec"].get("selector") == desired["spec"]["selector"]
    )


def _contains(found: Any, desired: Any) -> bool:
    if isinstance(desired, Mapping):
        return isinstance(found, Mapping) and all(_contains(found.get(key), value) for key, value in desired.items())
    if isinstance(desired, list):
        return isinstance(found, list) and len(found) == len(desired) and all(map(_contains, found, desired))
    return bool(found == desired)
