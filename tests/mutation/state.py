"""What an instance came to, without what differs between any two instances: names, uids, epochs, times."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_operator_api.conditions import ConditionType, Reason

Manifest = Mapping[str, Any]
_EPOCH = re.compile(r"\bepoch \d+")
_SAME = (
    "brief", "endpoint", "runnerImage", "runnersReady", "readyRunners", "restarts", "nextRestartAt", "model",
    "observedRetry", "observedRestart",
)  # fmt: skip
_MEMORY = (ConditionType.MODEL_AVAILABLE, ConditionType.RUNNER_FAILED)
_SUMMARY = (ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED)


def condition(instance: Manifest, kind: ConditionType) -> Manifest:
    """A condition; empty before the first status."""
    found = (instance.get("status") or {}).get("conditions") or ()
    return next((entry for entry in found if entry["type"] == kind), {})


def observed(instance: Manifest) -> bool:
    """Status is about the present spec."""
    seen = condition(instance, ConditionType.READY).get("observedGeneration")
    return bool(seen == instance["metadata"]["generation"])


def ready(instance: Manifest) -> bool:
    """It serves."""
    return observed(instance) and condition(instance, ConditionType.READY).get("status") == "True"


def stalled(instance: Manifest) -> bool:
    """Somebody has to act."""
    return observed(instance) and condition(instance, ConditionType.STALLED).get("status") == "True"


def suspended(instance: Manifest) -> bool:
    """The user wants nothing of it."""
    return observed(instance) and condition(instance, ConditionType.READY).get("reason") == Reason.SUSPENDED


def settled(instance: Manifest) -> bool:
    """Nothing more will come by itself."""
    return ready(instance) or stalled(instance) or suspended(instance)


def comparable(instance: Manifest, pods: Iterable[Manifest], told: Mapping[str, Any]) -> Any:
    """Everything that must be the same for two instances of one spec.

    `told`: by the name of a pod, what its runner was created with.
    """
    status = instance.get("status") or {}
    conditions = {c["type"]: [c["status"], c["reason"], c["message"]] for c in status.get("conditions") or ()}
    found: dict[str, Any] = {"pods": sorted((_pod(pod) for pod in pods), key=lambda pod: str(pod["name"]))}
    if ready(instance):
        found |= {"status": {key: status[key] for key in _SAME if key in status}, "told": dict(told)}
    elif condition(instance, ConditionType.READY).get("reason") == Reason.INVALID_SPEC:
        # The group that runs from an earlier spec is left alone; a fresh instance has none.
        conditions = {kind: conditions[kind] for kind in _SUMMARY}
        found = {}
    else:
        # What is remembered of the model and of the last failure: a fresh one remembers nothing.
        conditions = {kind: told for kind, told in conditions.items() if kind not in _MEMORY}
    found["conditions"] = conditions
    return _plain(found, instance["metadata"]["name"], instance["metadata"]["uid"])


def _pod(pod: Manifest) -> dict[str, Any]:
    metadata = pod["metadata"]
    return {
        "name": metadata["name"],
        "labels": metadata.get("labels"),
        "annotations": metadata.get("annotations"),
        "owners": metadata.get("ownerReferences"),
        "spec": {key: value for key, value in pod["spec"].items() if key != "nodeName"},
    }


def _plain(found: Any, name: str, uid: str) -> Any:
    text = json.dumps(found, sort_keys=True)
    text = text.replace(uid, "UID").replace(f"{name}-{uid[:8]}", "NAME-UID8").replace(name, "NAME")
    return json.loads(_EPOCH.sub("epoch N", text))


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two states differ, one line each."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [line for key in keys for line in differences(one.get(key), other.get(key), f"{path}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            line for i, (a, b) in enumerate(zip(one, other, strict=True)) for line in differences(a, b, f"{path}[{i}]")
        ]
    return [] if one == other else [f"{path}: {_short(one)} / {_short(other)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else f"{text[:280]}…{len(text)}"
