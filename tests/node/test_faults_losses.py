"""A killed rank, pod, container and node: diagnosed in a second, healed in place, evidence kept."""

import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.faults import Fault, Layer, fault
from tests.node.chat import Questions, ask, client, stream_of
from tests.node.chatter import Chatter
from tests.node.instance import Instance, one_per_node
from tests.node.kube import wait_for
from tests.node.processes import engine_pid, kill_container

NEAR_SECONDS = 10.0
"""Bound of an assertion; the figure that counts is printed (a busy machine must not fail the test)."""


def first_failed_write(cluster: Any, instance: Instance, since: datetime) -> datetime | None:
    """Time, by the API server's clock, of the first status write that says RunnerFailed=True.

    `since`: a cluster that was kept knows instances of the same name of earlier runs.
    """
    for write in cluster.status_writes(instance.namespace, instance.name):
        if datetime.fromisoformat(write.answered) < since:
            continue
        conditions = (write.body or {}).get("status", {}).get("conditions") or []
        if any(c["type"] == "RunnerFailed" and c["status"] == "True" for c in conditions):
            return datetime.fromisoformat(write.answered)
    return None


def confirm(row: Fault, failure: dict[str, Any]) -> None:
    """What status keeps of a failure is what the row says; behind who it was."""
    _, _, what = failure["message"].partition(": ")
    assert row.reason is not None and failure["reason"] == row.reason, failure
    row.check(RunnerState(failure["state"]), row.reason, what)


@pytest.fixture
def pair(create: Callable[..., Instance]) -> Instance:
    instance = create("pair", runners=2, runner=one_per_node("pair"))
    instance.wait_ready()
    return instance


def killed(rank: int) -> Fault:
    return Fault(
        id=f"node-engine-killed-rank-{rank}",
        what="engine killed while the group answers",
        injected=f"`kill -KILL` of rank {rank}'s engine, from its node",
        layer=Layer.CLUSTER,
        state=RunnerState.RUNNING,
        reason=Reason.ENGINE_CRASHED,
        says="engine killed by signal 9 (SIGKILL) in RunnerRunning…",
        rank=rank,
        within=1.0,
    )


@fault(killed(1), killed(0))
def test_a_killed_engine_is_named_within_a_second_and_the_same_pods_answer_again(
    cluster: Any, pair: Instance, questions: Questions, row: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    assert row.rank is not None
    rank = row.rank
    before, pods = pair.status(), pair.uids()
    question, answer = next(iter(questions.answers.items()))
    chatter = Chatter(cluster, pair, question)
    chatter.start()
    chatter.streaming()

    with client(cluster, pair) as llm:
        pid = engine_pid(cluster, pair, rank)
        killed_at, clock = datetime.now(UTC), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        failed_at = wait_for(
            "RunnerFailed is written", lambda: first_failed_write(cluster, pair, killed_at), NEAR_SECONDS
        )
        stream = stream_of(llm, pair.name, question)
        first = next(stream)
        token_after = time.monotonic() - clock
        assert first + "".join(stream) == answer
    status = pair.wait_ready(epoch=before["epoch"] + 1)

    chatter.finish()
    assert chatter.errors == [], "a client of a running request noticed more than a pause"
    assert chatter.answered >= 3, "the streams did not go on"
    assert pair.uids() == pods, "pods were replaced"
    assert status["epoch"] == before["epoch"] + 1
    assert status["restarts"] == 1
    failure = status["runners"][rank]["lastFailure"]
    confirm(row, failure)
    assert failure["signal"] == "SIGKILL"
    assert failure["epoch"] == before["epoch"]
    history = status["history"]
    assert len(history) == 1, "one failure of the group, not two"
    assert history[0]["rank"] == rank, "the consequence was taken for the cause"
    assert history[0].get("consequences", []) == [1 - rank]
    warnings = [e for e in pair.events() if e["type"] == "Warning"]
    assert len(warnings) == 1, [w["note"] for w in warnings]
    note = warnings[0]["note"]
    node = pair.pods()[rank]["spec"]["nodeName"]
    for word in (f"rank {rank}/2", f"pod pair-{rank}", f"node {node}", "SIGKILL", "RunnerRunning", "restart 1/5"):
        assert word in note, f"{word!r} is missing in: {note}"
    said = pair.condition(ConditionType.RUNNER_FAILED)
    assert said["status"] == "False"
    assert "SIGKILL" in said["message"], "the last failure must stay readable after recovery"
    with capsys.disabled():
        print(f"\n  rank {rank} killed: the first token of a new request after {token_after:.2f} s")
        row.took((failed_at - killed_at).total_seconds())


@fault(
    Fault(
        id="node-pod-deleted",
        what="a pod is deleted",
        injected="`kubectl delete pod` of rank 1",
        layer=Layer.CLUSTER,
        state=RunnerState.READY,
        reason=Reason.POD_DELETED,
        says="…deleted…",
    )
)
def test_a_deleted_pod_is_replaced_and_said_to_be_deleted(
    cluster: Any, pair: Instance, questions: Questions, row: Fault
) -> None:
    before, pods = pair.status(), pair.uids()
    pair.kubectl.run("delete", "pod", f"{pair.name}-1", "-n", pair.namespace, "--wait=false")
    status = pair.wait_ready(epoch=before["epoch"] + 1)
    confirm(row, status["runners"][1]["lastFailure"])
    assert status["history"][0]["rank"] == 1
    assert status.get("restarts", 0) == 0, "a deleted pod must not spend the budget"
    now = pair.uids()
    assert now[0] == pods[0] and now[1] != pods[1]
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, pair) as llm:
        assert ask(llm, pair.name, question) == answer


@fault(
    Fault(
        id="node-container-killed",
        what="a container is killed whole",
        injected="SIGKILL to all processes of rank 1's container, from its node",
        layer=Layer.CLUSTER,
        state=RunnerState.READY,
        reason=Reason.CONTAINER_CRASHED,
        says="…exit code 137 (SIGKILL)…",
    )
)
def test_a_container_killed_whole_is_reported_by_its_successor_in_the_same_pod(
    cluster: Any, pair: Instance, questions: Questions, row: Fault
) -> None:
    before, pods = pair.status(), pair.uids()
    kill_container(cluster, pair, 1)
    status = pair.wait_ready(epoch=before["epoch"] + 1)
    assert pair.uids() == pods
    confirm(row, status["runners"][1]["lastFailure"])
    assert status["history"][0]["rank"] == 1
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, pair) as llm:
        assert ask(llm, pair.name, question) == answer


@fault(
    Fault(
        id="node-stopped",
        what="a node stops",
        injected="kubelet, containers and network of a node end at once",
        layer=Layer.CLUSTER,
        who="the rank on that node",
        state=None,
        reason=Reason.RUNNER_UNREACHABLE,
        says="…silent since …",
        within=20.0,
        then="by itself: the next epoch, on another node (`NodeLost`, where Kubernetes said so first)",
    )
)
def test_a_stopped_node_moves_its_rank_and_keeps_the_evidence(
    cluster: Any,
    create: Callable[..., Instance],
    questions: Questions,
    row: Fault,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spread = {
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {
                        "weight": 100,
                        "podAffinityTerm": one_per_node("mover")["affinity"]["podAntiAffinity"][
                            "requiredDuringSchedulingIgnoredDuringExecution"
                        ][0],
                    }
                ]
            }
        }
    }
    instance = create("mover", runners=2, runner=spread)
    before = instance.wait_ready()
    operator_node = cluster.operator_node()
    rank = next(r for r, p in instance.pods().items() if p["spec"]["nodeName"] != operator_node)
    lost = instance.pods()[rank]["spec"]["nodeName"]
    clock = time.monotonic()
    cluster.stop_node(lost)
    try:
        instance.wait("the rank is missed", lambda status: (status.get("history") or [{}])[0].get("rank") == rank)
        with capsys.disabled():
            row.took(time.monotonic() - clock)
        status = instance.wait_ready(epoch=before["epoch"] + 1, timeout=150)
        took = time.monotonic() - clock
        assert instance.pods()[rank]["spec"]["nodeName"] == operator_node
        assert status["history"][0]["reason"] in (Reason.NODE_LOST, row.reason)
        assert status["history"][0]["rank"] == rank
        assert lost in status["runners"][rank]["lastFailure"]["message"]
        question, answer = next(iter(questions.answers.items()))
        with client(cluster, instance) as llm:
            assert ask(llm, instance.name, question) == answer
    finally:
        cluster.start_node(lost)
        wait_for(f"node {lost} is Ready", lambda: cluster.node_ready(lost), 60)
    with capsys.disabled():
        print(f"\n  node {lost} stopped: Ready on {operator_node} after {took:.1f} s")
