"""Objects for tests of observe and act."""

from datetime import UTC, datetime
from typing import Any

from mlx_operator.decide.observed import Settings
from mlx_operator_api import names
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport

NOW = datetime(2026, 11, 23, 15, 0, 0, 250_000, tzinfo=UTC)
SETTINGS = Settings(runner_image="runner:1", key_id="0123abcd")
UID = "11111111-2222"


def instance(name: str = "tiny", version: int = 1, uid: str = UID, **more: Any) -> dict[str, Any]:
    """A ModelInstance."""
    metadata = {"name": name, "namespace": "default", "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"metadata": metadata, "spec": {"model": {"source": "pvc://models/tiny"}}, **more}


def pod(
    rank: int = 0,
    version: int = 1,
    *,
    name: str = "tiny",
    uid: str | None = None,
    owner: str | None = UID,
    ip: str | None = "127.0.0.9",
    **more: Any,
) -> dict[str, Any]:
    """A pod of a rank, controlled by the instance `owner`; with an `ip` its container runs."""
    labels = {names.INSTANCE_LABEL: name, names.INSTANCE_UID_LABEL: UID, names.RANK_LABEL: str(rank)}
    metadata: dict[str, Any] = {"name": names.pod_name(name, rank), "namespace": "default"}
    metadata |= {"uid": uid or f"pod-{rank}", "resourceVersion": str(version), "labels": labels}
    metadata |= {"creationTimestamp": "2026-11-23T14:59:00Z", "managedFields": [{"manager": "x"}]}
    if owner:
        metadata["ownerReferences"] = [{"kind": names.KIND, "name": name, "uid": owner, "controller": True}]
    state = {"running": {}} if ip else {"waiting": {"reason": "ContainerCreating"}}
    status: dict[str, Any] = {"phase": "Running" if ip else "Pending"}
    status["containerStatuses"] = [{"name": names.CONTAINER, "state": state}]
    if ip:
        status["podIP"] = ip
    return {"metadata": metadata, "spec": {"nodeName": "n1"}, "status": status, **more}


def node(name: str = "n1", version: int = 1, ready: str = "True", heartbeat: str = "14:59:00") -> dict[str, Any]:
    """A node."""
    condition = {"type": "Ready", "status": ready, "reason": "KubeletReady"}
    condition |= {"lastHeartbeatTime": f"2026-11-23T{heartbeat}Z", "lastTransitionTime": "2026-11-23T12:00:00Z"}
    metadata = {"name": name, "uid": f"node-{name}", "resourceVersion": str(version)}
    return {"metadata": metadata, "status": {"conditions": [condition]}}


def report(seq: int = 1, incarnation: str = "2026-11-23T14:59:30Z-1", **more: Any) -> RunnerReport:
    """A report of rank 0."""
    return RunnerReport(
        **{
            "instance_uid": UID,
            "rank": 0,
            "epoch": 1,
            "state": RunnerState.IDLE,
            "since": NOW.replace(microsecond=0),
            **more,
        },
        incarnation=incarnation,
        seq=seq,
    )
