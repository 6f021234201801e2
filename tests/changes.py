"""Changes of an instance while it runs, and what each of them replaces.

One table, tried on a simulated cluster and on a real API server.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from mlx_operator_api import names


class Replaces(StrEnum):
    """What a change costs."""

    NOTHING = "nothing: the group goes on"
    EPOCH = "the engines, in the same pods"
    PODS = "the pods, all at once, and so the engines"


@dataclass(frozen=True, slots=True)
class Change:
    """A merge patch of an instance of two runners that is Ready."""

    what: str
    patch: dict[str, Any]
    replaces: Replaces
    before: dict[str, Any] = field(default_factory=dict)
    """The spec, beside model and runners."""
    runners: int = 2
    """Afterwards."""
    real: bool = False
    """Also tried on a real API server, with real supervisors."""


def spec(**changes: Any) -> dict[str, Any]:
    return {"spec": changes}


def annotated(name: str) -> dict[str, Any]:
    return {"metadata": {"annotations": {name: "1"}}}


CLAIM = {"model": {"source": "pvc://models/tiny"}}
CHANGES = (
    Change("image", spec(runner={"image": "runner:2"}), Replaces.PODS, real=True),
    Change("resources", spec(runner={"resources": {"limits": {"memory": "900Mi"}}}), Replaces.PODS, real=True),
    Change(
        "placement",
        spec(runner={"tolerations": [{"key": "gpu", "operator": "Exists"}]}),
        Replaces.PODS,
        real=True,
    ),
    Change("node selector", spec(runner={"nodeSelector": {"gpu": "yes"}}), Replaces.PODS),
    Change("environment", spec(runner={"env": [{"name": "A", "value": "1"}]}), Replaces.PODS),
    Change("pod labels", spec(runner={"podLabels": {"team": "a"}}), Replaces.PODS),
    Change("cache", spec(cache={"claimName": "cache"}), Replaces.PODS),
    Change("API keys", spec(serving={"apiKeySecretRef": {"name": "keys"}}), Replaces.PODS),
    Change("grace of the pods", spec(deadlines={"shutdown": "5m"}), Replaces.PODS),
    Change("another kind of source", spec(model={"source": "oci://registry.example/models/tiny:1"}), Replaces.PODS),
    Change("another claim", spec(model={"source": "pvc://others/tiny"}), Replaces.PODS),
    Change("model", spec(model={"source": "pvc://models/other"}), Replaces.EPOCH, real=True),
    Change("served name", spec(model={"servedName": "other"}), Replaces.EPOCH),
    Change("sharding", spec(sharding="Tensor"), Replaces.EPOCH, real=True),
    Change("serving parameters", spec(serving={"maxQueue": 1}), Replaces.EPOCH, real=True),
    Change("deadlines of the runners", spec(deadlines={"load": "20m"}), Replaces.EPOCH),
    Change("runners up", spec(runners=3), Replaces.EPOCH, runners=3, real=True),
    Change("runners down", spec(runners=1), Replaces.EPOCH, runners=1, real=True),
    Change("deadlines of the operator", spec(deadlines={"schedule": "1m", "pull": "1m"}), Replaces.NOTHING),
    Change("restart policy", spec(restartPolicy={"maxRestarts": 9}), Replaces.NOTHING),
    Change("sharding of one runner", spec(sharding="Tensor"), Replaces.NOTHING, before={"runners": 1}, runners=1),
    Change(
        "metadata", {"metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}}}, Replaces.NOTHING, real=True
    ),
    Change("retry annotation", annotated(names.RETRY_ANNOTATION), Replaces.NOTHING),
    Change("restart annotation", annotated(names.RESTART_ANNOTATION), Replaces.EPOCH, real=True),
)
