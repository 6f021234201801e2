"""The operator itself: killed in every phase, idle, upgraded; and what it leaves behind (nothing)."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.runner import RunnerState
from tests.node.chat import Questions, ask, client
from tests.node.chatter import Chatter
from tests.node.instance import Instance, one_per_node
from tests.node.kube import wait_for
from tests.node.processes import engine_pid, kill_engine, pids_in
from tests.node.reports import following, wait_state

PHASES = [
    RunnerState.IDLE,
    RunnerState.CONNECTING,
    RunnerState.CONNECTED,
    RunnerState.LOADING,
    RunnerState.LOADED,
    RunnerState.WARMING_UP,
    RunnerState.READY,
]


def test_the_operator_killed_in_any_phase_loses_nothing_and_starts_nothing_twice(
    cluster: Any, create: Callable[..., Instance], questions: Questions, capsys: pytest.CaptureFixture[str]
) -> None:
    instance = create("phases", runners=2, runner=one_per_node("phases"))
    epoch = instance.wait_ready()["epoch"]
    pods = instance.pods()

    def one_engine_each(_: dict[str, Any]) -> None:
        for rank, pod in pods.items():
            assert len(pids_in(cluster, pod)["engine"]) <= 1, f"rank {rank} runs two engines"

    with following(cluster, instance, 2, seconds=280) as streams:
        for phase in PHASES:
            doomed = cluster.operator_pids()
            instance.restart(str(phase))
            wait_state(streams, 1, epoch + 1, phase)
            cluster.kill_operator(pids=doomed)
            where = streams[1].states(epoch + 1)
            status = instance.wait_ready(epoch=epoch + 1, meanwhile=one_engine_each)
            assert status["epoch"] == epoch + 1, f"killed in {phase}: an epoch more than was asked for"
            assert not status.get("history"), f"killed in {phase}: {status['history']}"
            assert instance.uids() == {rank: pod["metadata"]["uid"] for rank, pod in pods.items()}
            epoch = status["epoch"]
            with capsys.disabled():
                print(f"\n  operator killed in {phase}; the next one found {where[-1]}", end="")
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as llm:
        assert ask(llm, instance.name, question) == answer


def test_requests_do_not_notice_that_the_operator_is_killed(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("deaf", runners=2, runner=one_per_node("deaf"))
    before = instance.wait_ready()
    chatter = Chatter(cluster, instance, next(iter(questions.answers)))
    chatter.start()
    chatter.streaming()
    cluster.kill_operator()
    chatter.streaming()
    chatter.finish()
    assert not chatter.errors
    assert chatter.answered
    after = instance.status()
    assert after["epoch"] == before["epoch"]
    assert not after.get("history")


def test_a_failure_while_the_operator_is_away_is_recorded_when_it_returns(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("away", runners=2, runner=one_per_node("away"))
    before = instance.wait_ready()
    chatter = Chatter(cluster, instance, next(iter(questions.answers)))
    chatter.start()
    chatter.streaming()
    cluster.kill_operator(wait=False)
    kill_engine(cluster, instance, 1)
    status = instance.wait_ready(epoch=before["epoch"] + 1)
    chatter.finish()
    assert [(h["rank"], h["reason"]) for h in status["history"]] == [(1, "EngineCrashed")]
    assert status["runners"][1]["lastFailure"]["signal"] == "SIGKILL"


def test_a_restarted_operator_writes_nothing_on_a_converged_cluster(
    cluster: Any, create: Callable[..., Instance]
) -> None:
    instance = create("still", runners=2, runner=one_per_node("still"))
    instance.wait_ready()
    engines = [engine_pid(cluster, instance, rank) for rank in (0, 1)]
    cluster.settle()
    offset = cluster.audit.mark()
    cluster.kill_operator()
    cluster.quiet(seconds=15)
    writes = cluster.writes(offset)
    assert not writes, [(w.verb, w.resource, w.name) for w in writes]
    assert [engine_pid(cluster, instance, rank) for rank in (0, 1)] == engines


def test_an_idle_group_costs_no_write_and_no_core(
    cluster: Any, create: Callable[..., Instance], capsys: pytest.CaptureFixture[str]
) -> None:
    offset = cluster.audit.mark()
    instance = create("idle", runners=2, runner=one_per_node("idle"))
    instance.wait_ready()
    cluster.settle()
    to_ready = cluster.status_writes(instance.namespace, instance.name, offset)
    mine = [
        r for r in cluster.writes(offset) if r.namespace == instance.namespace and r.verb == "create" and r.code == 201
    ]
    created = [(r.resource, (r.body or {}).get("metadata", {}).get("name") or r.name) for r in mine]
    events = [name for resource, name in created if resource == "events"]
    children = [c for c in created if c[0] != "events"]
    assert len(to_ready) + len(children) <= 12, f"{len(to_ready)} status patches to Ready, {children}"
    assert len(events) <= 5, events
    assert len(children) == len(set(children)), f"a child was created twice: {children}"

    pods = instance.pods()
    used = {rank: cluster.pod_cpu_seconds(p["spec"]["nodeName"], p["metadata"]["uid"]) for rank, p in pods.items()}
    offset, start = cluster.audit.mark(), time.monotonic()
    cluster.quiet(seconds=60)
    span = time.monotonic() - start
    writes = cluster.writes(offset)
    assert not writes, [(w.verb, w.resource, w.name) for w in writes]
    for rank, pod in pods.items():
        now = cluster.pod_cpu_seconds(pod["spec"]["nodeName"], pod["metadata"]["uid"])
        cores = (now - used[rank]) / span
        with capsys.disabled():
            print(f"\n  idle rank {rank}: {cores:.4f} core", end="")
        assert cores < 0.05, f"rank {rank} burns {cores:.3f} core while idle"
    with capsys.disabled():
        print(f"; to Ready: {len(to_ready)} status patches, {len(events)} events, {len(children)} children")


@pytest.mark.parametrize("phase", [*PHASES, RunnerState.PENDING])
def test_deletion_in_any_phase_leaves_no_child(
    cluster: Any, create: Callable[..., Instance], phase: RunnerState
) -> None:
    name = "gone-" + phase.removeprefix("Runner").lower()
    instance = create(name, runners=2)
    if phase is RunnerState.PENDING:
        wait_for("pods exist", lambda: len(instance.pods()) == 2, 60)
    else:
        epoch = instance.wait_ready()["epoch"]
        with following(cluster, instance, 2) as streams:
            instance.restart()
            wait_state(streams, 1, epoch + 1, phase)
    instance.delete()
    left = instance.kubectl.items("pods", instance.namespace)
    assert not [p for p in left if p["metadata"]["name"].startswith(name)]


def test_deletion_while_it_answers_or_has_failed_leaves_no_child(
    cluster: Any, create: Callable[..., Instance], questions: Questions
) -> None:
    busy = create("gone-running", runners=2)
    busy.wait_ready()
    chatter = Chatter(cluster, busy, next(iter(questions.answers)))
    chatter.start()
    chatter.streaming()
    busy.delete()
    chatter.finish()
    assert chatter.errors, "requests outlived the model that answered them"

    failed = create("gone-failed", source=cluster.broken_model("truncate"), runners=2)
    failed.wait_condition(ConditionType.STALLED, "True")
    failed.delete()
    assert not failed.kubectl.items("pods", failed.namespace)


def test_an_upgrade_with_a_new_default_image_restarts_nothing_until_asked(
    cluster: Any, create: Callable[..., Instance]
) -> None:
    instance = create("steady", runners=1)
    before = instance.wait_ready()
    image, uid = before["runnerImage"], instance.pods()[0]["metadata"]["uid"]
    newer = cluster.tag_runner_image("newer")
    cluster.install_operator(runner_image=newer)
    try:
        cluster.quiet(seconds=10)
        status = instance.status()
        assert status["runnerImage"] == image
        assert instance.pods()[0]["metadata"]["uid"] == uid
        instance.restart()
        after = instance.wait_ready(epoch=before["epoch"] + 1)
        assert after["runnerImage"] == newer
        assert instance.pods()[0]["metadata"]["uid"] != uid
        assert instance.pods()[0]["spec"]["containers"][0]["image"] == newer
    finally:
        cluster.install_operator()
