"""What tools that wait make of an instance in each phase: kubectl wait, kstatus (Helm, Flux), and Argo CD.

The phases are those of the simulated cluster; Argo CD's test data is checked to be the same objects.
`UPDATE_GOLDEN=1` writes it anew.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa import lua51

from mlx_operator.decide.observed import Refusal
from mlx_operator_api import crd, names
from mlx_operator_api.conditions import ConditionType, Reason
from tests.unit.scenes import ready
from tests.unit.simulator import START, Cluster

ARGO = Path(__file__).resolve().parents[2] / "examples" / "argocd"
Manifest = dict[str, Any]


def kstatus(instance: Manifest) -> str:
    """The algorithm of kstatus for a kind that it does not know.

    Source: https://pkg.go.dev/sigs.k8s.io/cli-utils/pkg/kstatus/status (`Compute`).
    """
    metadata, status = instance["metadata"], instance.get("status") or {}
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    if status.get("observedGeneration", metadata["generation"]) != metadata["generation"]:
        return "InProgress"
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions", ())}
    for kind, found in (("Reconciling", "InProgress"), ("Stalled", "Failed")):
        if conditions.get(kind) == "True":
            return found
    return "Current" if conditions.get("Ready", "True") == "True" else "InProgress"


def waited(instance: Manifest, kind: ConditionType) -> bool:
    """Whether `kubectl wait --for=condition=…` returns: it ignores a condition that is about an older generation."""
    for condition in (instance.get("status") or {}).get("conditions", ()):
        if condition["type"] == kind:
            newest = condition["observedGeneration"] >= instance["metadata"]["generation"]
            return bool(newest and condition["status"] == "True")
    return False


def argo(instance: Manifest) -> dict[str, str]:
    """What our health.lua answers."""
    lua = lua51.LuaRuntime()
    lua.globals().obj = lua.table_from(instance, recursive=True)
    return dict(lua.execute((ARGO / "health.lua").read_text(encoding="utf-8")))


def created() -> Cluster:
    """As the API server stores it, with the CRD's default."""
    cluster = Cluster()
    cluster.instance["status"] = crd.schema()["properties"]["status"]["default"]
    return cluster


def starting() -> Cluster:
    cluster = created()
    cluster.reconcile()
    return cluster


def edited() -> Cluster:
    """The user's change was stored a moment ago."""
    cluster = ready()
    cluster.change(serving={"maxQueue": 1})
    return cluster


def restarting_for_a_change() -> Cluster:
    cluster = edited()
    cluster.reconcile()
    return cluster


def edited_without_effect() -> Cluster:
    cluster = ready()
    cluster.change(restartPolicy={"maxRestarts": 9})
    cluster.reconcile()
    return cluster


def failed() -> Cluster:
    cluster = ready()
    cluster.kill_engine(1)
    cluster.hear_all()
    cluster.reconcile()
    return cluster


def recovered() -> Cluster:
    cluster = failed()
    cluster.run()
    return cluster


def exhausted() -> Cluster:
    cluster = ready(restartPolicy={"maxRestarts": 0})
    cluster.kill_engine(1)
    cluster.hear_all()
    cluster.reconcile()
    return cluster


def invalid() -> Cluster:
    cluster = ready()
    cluster.change(model={"source": "s3://bucket/model"})
    cluster.reconcile()
    return cluster


def refused() -> Cluster:
    cluster = created()
    cluster.refuse = Refusal(403, 'pods "tiny-0" is forbidden: exceeded quota: tight', START)
    cluster.reconcile()
    cluster.reconcile()
    return cluster


def unplaced() -> Cluster:
    cluster = created()
    cluster.unplaceable = "0/2 nodes are available: 2 Insufficient memory."
    for _ in range(3):
        cluster.reconcile()
        cluster.wait(1)
    return cluster


def unplaced_for_long() -> Cluster:
    cluster = unplaced()
    cluster.wait(700)
    cluster.reconcile()
    return cluster


def suspended() -> Cluster:
    cluster = ready()
    cluster.change(suspend=True)
    cluster.run()
    return cluster


def resumed() -> Cluster:
    cluster = suspended()
    cluster.change(suspend=False)
    cluster.reconcile()
    return cluster


def deleted() -> Cluster:
    cluster = ready()
    cluster.instance["metadata"]["deletionTimestamp"] = "2026-11-23T15:00:00Z"
    cluster.reconcile()
    return cluster


PHASES: tuple[tuple[Callable[[], Cluster], str, bool, bool, str], ...] = (
    # phase, kstatus, wait for Ready, wait for Stalled, Argo CD
    (created, "InProgress", False, False, "Progressing"),
    (starting, "InProgress", False, False, "Progressing"),
    (ready, "Current", True, False, "Healthy"),
    (edited, "InProgress", False, False, "Progressing"),
    (restarting_for_a_change, "InProgress", False, False, "Progressing"),
    (edited_without_effect, "Current", True, False, "Healthy"),
    (failed, "InProgress", False, False, "Progressing"),
    (recovered, "Current", True, False, "Healthy"),
    (exhausted, "Failed", False, True, "Degraded"),
    (invalid, "Failed", False, True, "Degraded"),
    (refused, "Failed", False, True, "Degraded"),
    (unplaced, "InProgress", False, False, "Progressing"),
    (unplaced_for_long, "Failed", False, True, "Degraded"),
    # Nothing is under way and nothing is in the way, yet nothing answers: as kstatus sees a Job that is suspended.
    (suspended, "InProgress", False, False, "Suspended"),
    (resumed, "InProgress", False, False, "Progressing"),
    (deleted, "Terminating", True, False, "Healthy"),
)


@pytest.mark.parametrize(
    ("phase", "computed", "is_ready", "is_stalled", "health"), PHASES, ids=[phase[0].__name__ for phase in PHASES]
)
def test_every_tool_that_waits_is_right_in(
    phase: Callable[[], Cluster], computed: str, is_ready: bool, is_stalled: bool, health: str
) -> None:
    instance = phase().instance
    assert kstatus(instance) == computed
    assert waited(instance, ConditionType.READY) is is_ready
    assert waited(instance, ConditionType.STALLED) is is_stalled
    answer = argo(instance)
    assert answer["status"] == health
    assert answer["message"]


def test_nothing_that_waits_returns_while_a_group_starts() -> None:
    cluster = created()
    seen: list[Manifest] = []

    def look() -> bool:
        seen.append({"metadata": dict(cluster.instance["metadata"]), "status": dict(cluster.instance["status"])})
        return cluster.ready()

    cluster.run(until=look)
    assert len({instance["status"].get("runnersReady") for instance in seen}) > 1
    *before, last = [kstatus(instance) for instance in seen]
    assert set(before) == {"InProgress"}
    assert last == "Current"


def test_at_most_one_of_reconciling_and_stalled_is_true_and_neither_while_ready() -> None:
    for phase, *_ in PHASES:
        for status in phase().patches:
            true = {condition.type for condition in status.conditions if condition.status == "True"}
            assert len(true & {ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED}) <= 1, phase


def test_argo_cds_test_data_says_what_the_operator_writes() -> None:
    data = {f"testdata/{phase[0].__name__}.yaml": _manifest(phase[0]()) for phase in PHASES}
    if os.environ.get("UPDATE_GOLDEN") == "1":
        tests = [{"healthStatus": argo(instance), "inputPath": path} for path, instance in data.items()]
        for path, content in {"health_test.yaml": {"tests": tests}, **data}.items():
            (ARGO / path).write_text(yaml.safe_dump(content, sort_keys=False, width=120), encoding="utf-8")
    files = {str(path.relative_to(ARGO)): _read(path) for path in ARGO.glob("**/*.yaml")}
    tests = files.pop("health_test.yaml")["tests"]
    assert {path: _essence(stored) for path, stored in files.items()} == {p: _essence(d) for p, d in data.items()}
    assert {test["inputPath"]: test["healthStatus"] for test in tests} == {p: argo(d) for p, d in files.items()}


def _read(path: Path) -> Manifest:
    found: Manifest = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _essence(instance: Manifest) -> tuple[Any, ...]:
    """What health depends on; times and other steps of the way there may differ."""
    status = instance["status"]
    conditions = {c["type"]: (c["status"], c["reason"]) for c in status.get("conditions", ())}
    return instance["metadata"]["generation"], status.get("observedGeneration"), conditions


def _manifest(cluster: Cluster) -> Manifest:
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, **cluster.instance}


def test_a_suspended_instance_says_so_in_its_reason() -> None:
    conditions = {c["type"]: c["reason"] for c in suspended().instance["status"]["conditions"]}
    assert {conditions[kind] for kind in ("Ready", "Reconciling", "Stalled")} == {Reason.SUSPENDED}
