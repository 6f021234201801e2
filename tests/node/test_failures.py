"""A killed rank, pod, container and node: diagnosed in a second, healed in place, evidence kept."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import openai
import pytest

from mlx_operator_api.conditions import ConditionType, Reason
from tests.node.chat import Questions, ask, client
from tests.node.instance import Instance, one_per_node
from tests.node.kube import wait_for
from tests.node.processes import kill_container, kill_engine

NEAR_SECONDS = 10.0
"""Bound of an assertion; the figure that counts is printed (a busy machine must not fail the test)."""


class Chatter(threading.Thread):
    """A few streams of long answers, one after the other, until told to stop; keeps what became of them."""

    def __init__(self, cluster: Any, instance: Instance, question: str, streams: int = 3) -> None:
        super().__init__(daemon=True)
        self._cluster, self._instance, self._question, self._streams = cluster, instance, question, streams
        self._enough = threading.Event()
        self.started = threading.Event()
        """A token came; cleared by whoever wants to see another."""
        self.errors: list[Exception] = []
        self.answered = 0

    def run(self) -> None:
        with client(self._cluster, self._instance) as llm:
            threads = [threading.Thread(target=self._ask, args=(llm,), daemon=True) for _ in range(self._streams)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _ask(self, llm: openai.OpenAI) -> None:
        messages = [{"role": "user", "content": self._question}]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not self._enough.is_set():
            try:
                stream = llm.chat.completions.create(
                    model=self._instance.name, messages=messages, temperature=1.5, max_tokens=400, stream=True
                )
                for _ in stream:
                    self.started.set()
                self.answered += 1
            except openai.OpenAIError as error:
                self.errors.append(error)
                return

    def streaming(self) -> None:
        """Wait until a token comes from now on."""
        self.started.clear()
        assert self.started.wait(60), "the requests never began to stream"

    def finish(self) -> None:
        """No further question; wait for the last answers."""
        self._enough.set()
        self.join(100)


def first_failed_write(cluster: Any, instance: Instance) -> datetime | None:
    """Time, by the API server's clock, of the first status write that says RunnerFailed=True."""
    for write in cluster.status_writes(instance.namespace, instance.name):
        conditions = (write.body or {}).get("status", {}).get("conditions") or []
        if any(c["type"] == "RunnerFailed" and c["status"] == "True" for c in conditions):
            return datetime.fromisoformat(write.answered)
    return None


@pytest.fixture
def pair(create: Callable[..., Instance]) -> Instance:
    instance = create("pair", runners=2, runner=one_per_node("pair"))
    instance.wait_ready()
    return instance


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_engine_is_named_within_a_second_and_the_same_pods_answer_again(
    cluster: Any, pair: Instance, questions: Questions, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before, pods = pair.status(), pair.uids()
    question, answer = next(iter(questions.answers.items()))
    chatter = Chatter(cluster, pair, question)
    chatter.start()
    chatter.streaming()

    killed, clock = datetime.now(UTC), time.monotonic()
    kill_engine(cluster, pair, rank)

    failed_at = wait_for("RunnerFailed is written", lambda: first_failed_write(cluster, pair), NEAR_SECONDS)
    with client(cluster, pair) as llm:
        assert ask(llm, pair.name, question) == answer
    answered = time.monotonic() - clock
    status = pair.wait_ready(epoch=before["epoch"] + 1)

    chatter.finish()
    assert chatter.errors == [], "a client of a running request noticed more than a pause"
    assert chatter.answered >= 3, "the streams did not go on"
    assert pair.uids() == pods, "pods were replaced"
    assert status["epoch"] == before["epoch"] + 1
    assert status["restarts"] == 1
    failure = status["runners"][rank]["lastFailure"]
    assert failure["reason"] == Reason.ENGINE_CRASHED
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
    took = (failed_at - killed).total_seconds()
    with capsys.disabled():
        print(f"\n  rank {rank} killed: RunnerFailed after {took:.2f} s, an answer after {answered:.2f} s")
    assert took < 3.0, "it is a third of a second on an idle machine, and promised within one"


def test_a_deleted_pod_is_replaced_and_said_to_be_deleted(cluster: Any, pair: Instance, questions: Questions) -> None:
    before, pods = pair.status(), pair.uids()
    pair.kubectl.run("delete", "pod", f"{pair.name}-1", "-n", pair.namespace, "--wait=false")
    status = pair.wait_ready(epoch=before["epoch"] + 1)
    assert status["history"][0]["reason"] == Reason.POD_DELETED
    assert status["history"][0]["rank"] == 1
    assert status.get("restarts", 0) == 0, "a deleted pod must not spend the budget"
    now = pair.uids()
    assert now[0] == pods[0] and now[1] != pods[1]
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, pair) as llm:
        assert ask(llm, pair.name, question) == answer


def test_a_container_killed_whole_is_reported_by_its_successor_in_the_same_pod(
    cluster: Any, pair: Instance, questions: Questions
) -> None:
    before, pods = pair.status(), pair.uids()
    kill_container(cluster, pair, 1)
    status = pair.wait_ready(epoch=before["epoch"] + 1)
    assert pair.uids() == pods
    failure = status["runners"][1]["lastFailure"]
    assert failure["reason"] in (Reason.CONTAINER_CRASHED, Reason.OUT_OF_MEMORY)
    assert failure["state"] in ("RunnerReady", "RunnerRunning")
    assert status["history"][0]["rank"] == 1
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, pair) as llm:
        assert ask(llm, pair.name, question) == answer


def test_a_stopped_node_moves_its_rank_and_keeps_the_evidence(
    cluster: Any, create: Callable[..., Instance], questions: Questions, capsys: pytest.CaptureFixture[str]
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
        status = instance.wait_ready(epoch=before["epoch"] + 1, timeout=150)
        took = time.monotonic() - clock
        assert instance.pods()[rank]["spec"]["nodeName"] == operator_node
        assert status["history"][0]["reason"] in (Reason.NODE_LOST, Reason.RUNNER_UNREACHABLE)
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
