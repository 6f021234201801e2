"""One cause for the failures of several ranks, in whatever order the API server and the runners tell of them."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import permutations
from typing import Any

import pytest

from mlx_operator.decide.observed import Observed
from mlx_operator.decide.plan import plan
from mlx_operator_api.base import format_time
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import GroupFailure
from tests.unit.scenes import failures, ready, see
from tests.unit.simulator import Cluster
from tests.unit.test_plan_pod_ends import KILLING, UNHEALTHY

STEP = timedelta(milliseconds=300)
Channels = Mapping[tuple[str, str], Any]
"""What the operator hears, by who tells it: a supervisor, the watch of a pod or of a node, Events."""


def channels(cluster: Cluster) -> Channels:
    found: dict[tuple[str, str], Any] = {}
    for uid, view in cluster.views.items():
        found["report", uid] = view
    for name, pod in cluster.pods.items():
        found["pod", name] = copy.deepcopy(pod.manifest)
    for name, node in cluster.nodes.items():
        found["node", name] = node
    for uid, notes in cluster.notes.items():
        found["events", uid] = notes
    return found


def observed(cluster: Cluster, heard: Channels) -> Observed:
    def of(kind: str) -> dict[str, Any]:
        return {name: value for (other, name), value in heard.items() if other == kind}

    made = replace(cluster.observed(), runners=of("report"), nodes=of("node"), pod_events=of("events"))
    return replace(made, pods=tuple(copy.deepcopy(pod) for pod in of("pod").values()))


def container_killed(cluster: Cluster, rank: int) -> None:
    cluster.kill_container(rank, "Error")


def engine_killed(cluster: Cluster) -> None:
    cluster.kill_engine(1)


def out_of_memory(cluster: Cluster) -> None:
    cluster.kill_container(1)


def out_of_memory_and_started_again(cluster: Cluster) -> None:
    cluster.kill_container(1)
    cluster._start_container(cluster.pods["tiny-1"])


def engine_first_then_the_container(cluster: Cluster) -> None:
    """The kernel takes the engine, the supervisor tells, and then the kernel takes the rest."""
    cluster.kill_engine(1)
    cluster.hear_all()
    cluster.kill_container(1)


def killed_and_started_again(cluster: Cluster) -> None:
    cluster.kill_container(1, reason="Error")
    cluster._start_container(cluster.pods["tiny-1"])


def killed_by_its_probe(cluster: Cluster) -> None:
    cluster.kill_container(1, reason="Error")
    cluster.notes = {cluster.pods["tiny-1"].manifest["metadata"]["uid"]: (KILLING, UNHEALTHY)}


def told_to_stop(cluster: Cluster, rank: int) -> None:
    cluster.supervisor(rank).publish(state=RunnerState.SHUTTING_DOWN, draining=True, since=cluster.now)


def pod_deleted(cluster: Cluster) -> None:
    told_to_stop(cluster, 1)
    cluster.delete("tiny-1")


def pod_evicted(cluster: Cluster) -> None:
    told_to_stop(cluster, 1)
    target = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drain"}
    cluster.pods["tiny-1"].manifest["status"]["conditions"].append(target)
    cluster.delete("tiny-1")


def node_lost(cluster: Cluster) -> None:
    cluster.lose_node("n2")


def node_of_two_ranks_lost(cluster: Cluster) -> None:
    cluster.lose_node("n1")


def node_lost_and_its_pod_evicted(cluster: Cluster) -> None:
    cluster.lose_node("n2")
    message = "Taint manager: deleting due to NoExecute taint"
    target = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": message}
    pod = cluster.pods["tiny-1"].manifest
    pod["status"]["conditions"].append(target)
    pod["metadata"]["deletionTimestamp"] = format_time(cluster.now)


@dataclass(frozen=True)
class Row:
    event: Callable[[Cluster], None]
    rank: int
    reason: Reason
    alike: tuple[int, ...] = ()
    """Ranks of which the same is true: whichever is heard of first is the cause, and none is a consequence."""


TABLE = (
    Row(engine_killed, 1, Reason.ENGINE_CRASHED),
    Row(out_of_memory, 1, Reason.OUT_OF_MEMORY),
    Row(out_of_memory_and_started_again, 1, Reason.OUT_OF_MEMORY),
    Row(engine_first_then_the_container, 1, Reason.OUT_OF_MEMORY),
    Row(killed_and_started_again, 1, Reason.CONTAINER_CRASHED),
    Row(killed_by_its_probe, 1, Reason.PROBE_FAILED),
    Row(pod_deleted, 1, Reason.POD_DELETED),
    Row(pod_evicted, 1, Reason.EVICTED),
    Row(node_lost, 1, Reason.NODE_LOST),
    Row(node_of_two_ranks_lost, 0, Reason.NODE_LOST, alike=(2,)),
    Row(node_lost_and_its_pod_evicted, 1, Reason.NODE_LOST),
)


def happened(event: Callable[[Cluster], None]) -> tuple[Cluster, Channels, Channels]:
    """A group of three before and after an event, with what it did to the others."""
    cluster = ready(3)
    cluster.run(10)
    cluster.hear_all()
    before = channels(cluster)
    event(cluster)
    cluster._engines()
    cluster.hear_all()
    return cluster, before, channels(cluster)


def told(
    cluster: Cluster, status: dict[str, Any], before: Channels, after: Channels, order: tuple[tuple[str, str], ...]
) -> GroupFailure:
    """What stands in history once everything was heard, one by one; nothing that is recorded is lost on the way."""
    cluster.instance["status"], heard = status, dict(before)
    for channel in order:
        cluster.now += STEP
        heard[channel] = after[channel]
        write(cluster, heard)
    cluster.now += timedelta(seconds=7)
    for uid in {uid for kind, uid in heard if kind == "report" and heard[kind, uid].connected}:
        heard["report", uid] = replace(heard["report", uid], received=cluster.now)
    write(cluster, heard)
    assert len(cluster.status.history) == 1, order
    return cluster.status.history[0]


def write(cluster: Cluster, heard: Channels) -> None:
    made = plan(observed(cluster, heard), cluster.now)
    cluster._check_memory(cluster.status, made.status)
    cluster.instance["status"] = made.status.model_dump(mode="json", by_alias=True, exclude_none=True)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.event.__name__)
def test_the_cause_is_the_same_in_every_order_of_arrival(row: Row) -> None:
    cluster, before, after = happened(row.event)
    status, began = cluster.instance["status"], cluster.now
    changed = sorted(channel for channel in after if after[channel] != before.get(channel))
    assert len(changed) > 1, "the others notice it too"
    for order in permutations(changed):
        cluster.now = began
        failure = told(cluster, status, before, after, order)
        causes = (row.rank, *row.alike)
        assert failure.rank in causes, (order, failure.message)
        assert failure.reason is row.reason, (order, failure.message)
        assert failure.consequences == tuple(rank for rank in (0, 1, 2) if rank not in causes), order


def test_of_two_reasons_of_their_own_the_earlier_is_the_cause_and_neither_is_a_consequence() -> None:
    cluster = ready(3)
    cluster.kill_engine(2)
    cluster.now += timedelta(seconds=1)
    cluster.kill_engine(1)
    cluster._engines()
    cluster.hear_all()
    cluster.reconcile()
    failure = cluster.status.history[0]
    assert (failure.rank, failure.consequences) == (2, (0,))


@pytest.mark.parametrize("kill", [Cluster.kill_engine, container_killed])
def test_of_two_ranks_lost_at_once_neither_is_called_a_consequence(kill: Callable[[Cluster, int], None]) -> None:
    cluster = ready()
    kill(cluster, 0)
    kill(cluster, 1)
    failure = see(cluster)
    assert (failure.rank, failure.consequences) == (0, ())
    assert all("consequence" not in line for line in cluster.status.brief), cluster.status.brief
    assert {record.state for record in cluster.status.runners} == {RunnerState.FAILED}
    assert len(failures(cluster)) == 1


@pytest.mark.parametrize("kill", [Cluster.kill_engine, container_killed])
def test_a_rank_that_is_told_later_to_have_ended_by_itself_is_no_consequence(
    kill: Callable[[Cluster, int], None],
) -> None:
    cluster = ready()
    kill(cluster, 1)
    assert see(cluster).consequences == (0,)
    kill(cluster, 0)
    failure = see(cluster)
    assert (failure.rank, failure.consequences) == (1, ())
    assert all("consequence" not in line for line in cluster.status.brief), cluster.status.brief
    assert len(failures(cluster)) == 1
