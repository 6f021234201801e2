"""Faults that only a real kernel and a real network can give: a frozen process, an OOM kill, a cut cable."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.faults import Fault, Layer, fault
from tests.node.chat import Questions, ask, client
from tests.node.chatter import Chatter
from tests.node.instance import Instance, one_per_node
from tests.node.kube import wait_for
from tests.node.processes import engine_pid

FOUND_SECONDS = 60.0
"""Of an assertion, for a busy machine; what was measured is printed."""


@pytest.fixture
def pair(create: Callable[..., Instance]) -> Instance:
    instance = create("pair", runners=2, runner=one_per_node("pair"))
    instance.wait_ready()
    return instance


def confirm(instance: Instance, row: Fault, began: float, rank: int, *also: Reason) -> None:
    """The failure of the group in status: which rank, why, with which words, and in which condition."""

    def found(status: dict[str, Any]) -> dict[str, Any] | None:
        history = status.get("history") or [{}]
        right = history[0].get("rank") == rank and history[0].get("reason") in (row.reason, *also)
        return history[0] if right else None

    failure = instance.wait(f"{row.reason} of rank {rank}", found, FOUND_SECONDS)
    row.took(time.monotonic() - began)
    who, _, what = failure["message"].partition(": ")
    assert who.startswith(f"rank {rank}/2 pod {instance.name}-{rank} on node ")
    if row.reason is not None and failure["reason"] == row.reason:
        told = instance.status()["runners"][rank]["lastFailure"]
        row.check(RunnerState(told["state"]), row.reason, what)
    said = instance.condition(ConditionType.RUNNER_FAILED)
    assert who in said["message"]


def answers(cluster: Any, instance: Instance, questions: Questions, epoch: int) -> None:
    status = instance.wait_ready(epoch=epoch)
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as llm:
        assert ask(llm, instance.name, question) == answer
    assert instance.condition(ConditionType.RUNNER_FAILED)["status"] == "False"
    assert status["history"], "the failure must stay readable after recovery"


@fault(
    Fault(
        id="node-engine-stopped",
        what="engine frozen",
        injected="`kill -STOP` of rank 1's engine, from its node",
        layer=Layer.CLUSTER,
        state=RunnerState.READY,
        reason=Reason.RUNNER_STALLED,
        says="engine process stopped (state T for … s) in RunnerReady, step …, last progress … s ago…",
        within=10.0,
    )
)
def test_a_frozen_engine_is_named_and_the_same_pods_answer_again(
    cluster: Any, pair: Instance, questions: Questions, row: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    before, pods = pair.status(), pair.uids()
    pid = engine_pid(cluster, pair, 1)
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    with capsys.disabled():
        confirm(pair, row, began, 1)
    answers(cluster, pair, questions, before["epoch"] + 1)
    assert pair.uids() == pods
    assert pair.status()["restarts"] == 1


EATER = """
import os, sys, time
procs, victim = sys.argv[1:]
with open(procs, "w") as file:
    file.write(str(os.getpid()))
eaten = []
while os.path.exists(f"/proc/{victim}"):
    eaten.append(b"x" * (4 << 20))
    time.sleep(0.02)
"""


@contextmanager
def eater(victim: int) -> Iterator[None]:
    """A process in the cgroup of a container that eats until the kernel has killed `victim`, the first in its order."""
    Path(f"/proc/{victim}/oom_score_adj").write_text("1000")
    lines = Path(f"/proc/{victim}/cgroup").read_text().splitlines()
    path = next(line.split(":", 2)[2] for line in lines if line.split(":", 2)[1] == "memory")
    procs = Path("/sys/fs/cgroup/memory") / path.lstrip("/") / "cgroup.procs"
    process = subprocess.Popen([sys.executable, "-c", EATER, str(procs), str(victim)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@fault(
    Fault(
        id="node-oom",
        what="the kernel's OOM killer in a container",
        injected="a process that eats the memory limit inside the cgroup of rank 1's container (version 1)",
        layer=Layer.CLUSTER,
        state=RunnerState.READY,
        reason=Reason.OUT_OF_MEMORY,
        says="…memory limit 640Mi…",
    )
)
def test_a_container_out_of_memory_is_told_with_its_limit(
    cluster: Any,
    create: Callable[..., Instance],
    questions: Questions,
    row: Fault,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = {"resources": {"limits": {"memory": "640Mi"}}}
    instance = create("hungry", runners=2, runner={**one_per_node("hungry"), **limits})
    before = instance.wait_ready()
    pid = engine_pid(cluster, instance, 1)
    began = time.monotonic()
    with eater(pid), capsys.disabled():
        confirm(instance, row, began, 1)
    answers(cluster, instance, questions, before["epoch"] + 1)


CUT = Fault(
    id="node-partition-idle",
    what="node cut off while idle",
    injected="the node's network interface goes down; everything on it goes on running",
    layer=Layer.CLUSTER,
    who="the rank on that node",
    state=None,
    reason=Reason.RUNNER_UNREACHABLE,
    says="its supervisor cannot be reached, silent since …",
    within=20.0,
    then="by itself: the next epoch, when the node is back or (`NodeLost`, once Kubernetes says so) on another one",
)


@fault(CUT)
def test_a_node_that_is_cut_off_while_idle_is_named_and_the_group_answers_once_it_is_back(
    cluster: Any, pair: Instance, questions: Questions, row: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off(cluster, pair, questions, row, capsys)


@fault(
    Fault(
        id="node-partition-busy",
        what="node cut off while the group answers",
        injected=CUT.injected,
        layer=Layer.CLUSTER,
        who=CUT.who,
        state=None,
        reason=CUT.reason,
        says=CUT.says,
        within=CUT.within,
        then=CUT.then,
    )
)
def test_a_node_that_is_cut_off_while_the_group_answers_is_named_as_well(
    cluster: Any, pair: Instance, questions: Questions, row: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    chatter = Chatter(cluster, pair, next(iter(questions.answers)))
    chatter.start()
    chatter.streaming()
    cut_off(cluster, pair, questions, row, capsys)
    chatter.finish()


def cut_off(
    cluster: Any, instance: Instance, questions: Questions, row: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    before, operator = instance.status(), cluster.operator_node()
    rank, node = next(
        (rank, pod["spec"]["nodeName"]) for rank, pod in instance.pods().items() if pod["spec"]["nodeName"] != operator
    )
    began = time.monotonic()
    cluster.partition(node)
    try:
        with capsys.disabled():
            confirm(instance, row, began, rank, Reason.NODE_LOST)
    finally:
        cluster.heal(node)
        wait_for(f"node {node} is Ready", lambda: cluster.node_ready(node), 90)
    answers(cluster, instance, questions, before["epoch"] + 1)
