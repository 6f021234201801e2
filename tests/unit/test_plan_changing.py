"""Every change of the table, on the simulated cluster: what is replaced, and that no two epochs serve."""

from typing import Any

import pytest

from mlx_operator_api.runner import SERVING
from tests.changes import CHANGES, Change, Replaces
from tests.unit.scenes import ready
from tests.unit.simulator import Cluster


def merged(old: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7396."""
    out = dict(old)
    for key, value in patch.items():
        out[key] = merged(out.get(key) or {}, value) if isinstance(value, dict) else value
    return out


def changed(cluster: Cluster, patch: dict[str, Any]) -> None:
    instance = merged(cluster.instance, patch)
    instance["metadata"]["generation"] += instance["spec"] != cluster.instance["spec"]
    cluster.instance = instance


def serving(cluster: Cluster) -> set[int]:
    """Epochs of the engines that would answer."""
    supervisors = (pod.supervisor for pod in cluster.pods.values())
    return {s.report.epoch for s in supervisors if s is not None and s.report.state in SERVING}


def uids(cluster: Cluster) -> dict[str, str]:
    return {name: pod.manifest["metadata"]["uid"] for name, pod in cluster.pods.items()}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.what)
def test_a_change_replaces_what_it_must_and_no_more(change: Change) -> None:
    cluster = ready(**change.before)
    before, epoch = uids(cluster), cluster.status.epoch
    changed(cluster, change.patch)

    def look() -> bool:
        assert len(serving(cluster)) <= 1, serving(cluster)
        return False

    cluster.run(until=look)
    assert cluster.ready()
    after = uids(cluster)
    assert sorted(after) == [f"tiny-{rank}" for rank in range(change.runners)]
    kept = {name for name in after if after[name] == before.get(name)}
    assert kept == (set() if change.replaces is Replaces.PODS else set(before) & set(after))
    assert cluster.status.epoch == epoch + (change.replaces is not Replaces.NOTHING)
    assert (cluster.status.restarts, cluster.status.history) == (0, ()), "a change is no failure"
    if change.replaces is Replaces.NOTHING:
        assert cluster.sent == []


def test_suspended_and_resumed_it_is_a_new_epoch_in_new_pods() -> None:
    cluster = ready()
    before = uids(cluster)
    changed(cluster, {"spec": {"suspend": True}})
    cluster.run()
    assert (cluster.pods, serving(cluster)) == ({}, set())
    changed(cluster, {"spec": {"suspend": False}})
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 2
    assert not set(uids(cluster).values()) & set(before.values())
