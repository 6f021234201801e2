"""A group on two real nodes answers like one process, through its Service, with the official client."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mlx_operator_api.runner import ORDER, RunnerState
from tests.node.chat import Questions, ask, ask_streaming, client
from tests.node.instance import Instance, one_per_node
from tests.node.reports import following

LIFECYCLE = [
    RunnerState.PENDING,  # of this epoch: CreateRunner was accepted, its engine is being taken
    RunnerState.IDLE,
    RunnerState.CONNECTING,
    RunnerState.CONNECTED,
    RunnerState.LOADING,
    RunnerState.LOADED,
    RunnerState.WARMING_UP,
    RunnerState.READY,
]


class StatusWatch:
    """All versions of an instance's status, from `kubectl get --watch`."""

    def __init__(self, instance: Instance) -> None:
        kubectl = instance.kubectl
        argv = [str(kubectl.program), f"--kubeconfig={kubectl.kubeconfig}", "get", "mi", instance.name]
        argv += ["-n", instance.namespace, "--watch", "-o", "jsonpath={.status}{'\\n'}"]
        self.versions: list[dict[str, Any]] = []
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip():
                self.versions.append(json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10)
        self._thread.join(timeout=10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def watching(instance: Instance) -> Iterator[StatusWatch]:
    watch = StatusWatch(instance)
    try:
        yield watch
    finally:
        watch.close()


def assert_never_backwards(versions: list[dict[str, Any]]) -> None:
    """Within an epoch no rank's state goes back (Running returns to Ready)."""
    last: dict[tuple[int, int], int] = {}
    for status in versions:
        for runner in status.get("runners", []):
            state = RunnerState(runner["state"])
            if state is RunnerState.RUNNING:
                state = RunnerState.READY
            key = (runner["rank"], runner.get("epoch", 0))
            assert ORDER[state] >= last.get(key, 0), f"rank {key[0]} went back to {state} in epoch {key[1]}"
            last[key] = ORDER[state]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("pipeline", {"runners": 2, "sharding": "Pipeline"}),
        ("tensor", {"runners": 2, "sharding": "Tensor"}),
        ("single", {"runners": 1}),
    ],
)
def test_a_group_answers_every_trained_question_exactly_as_one_process_does(
    cluster: Any, create: Callable[..., Instance], questions: Questions, name: str, spec: dict[str, Any]
) -> None:
    ranks = spec["runners"]
    instance = create(name, runner=one_per_node(name), **spec)
    with watching(instance) as watch, contextlib.ExitStack() as stack:
        epoch = instance.wait_ready()["epoch"]
        # The first epoch begins when the operator wants; of one that we ask for, no state is missed.
        streams = stack.enter_context(following(cluster, instance, ranks))
        instance.restart()
        status = instance.wait_ready(epoch=epoch + 1)
        assert len({p["spec"]["nodeName"] for p in instance.pods().values()}) == ranks
        with client(cluster, instance) as openai:
            for question, answer in questions.answers.items():
                assert ask(openai, instance.name, question) == answer
                assert ask_streaming(openai, instance.name, question) == answer
            for question, tokens in questions.token_counts.items():
                reply = openai.chat.completions.create(
                    model=instance.name, messages=[{"role": "user", "content": question}], temperature=0
                )
                assert reply.usage is not None
                assert reply.usage.completion_tokens == tokens, question
        expected = [s for s in LIFECYCLE if ranks > 1 or s not in (RunnerState.CONNECTING, RunnerState.CONNECTED)]
        for stream in streams.values():
            seen = [s for s in stream.states(status["epoch"]) if s is not RunnerState.RUNNING]
            assert list(dict.fromkeys(seen)) == expected, f"rank {stream.rank}"
    assert_never_backwards(watch.versions)
    assert status["runnersReady"] == f"{ranks}/{ranks}"
    assert status["brief"][0].startswith("Ready")
    row = instance.kubectl.run("get", "mi", instance.name, "-n", instance.namespace)
    assert row.split("\n")[0].split() == ["NAME", "READY", "REASON", "RUNNERS", "RESTARTS", "MODEL", "AGE"]
    assert row.split("\n")[1].split()[:5] == [instance.name, "True", "Ready", f"{ranks}/{ranks}", "0"]
    described = instance.describe()
    assert described.index("Brief:") < described.index("Conditions:")
    assert ("ModelLoaded" in described and "GroupConnected" in described) or ranks == 1


def test_a_claim_serves_its_model_read_only_to_two_instances_at_once(
    cluster: Any, create: Callable[..., Instance], namespace: str, questions: Questions
) -> None:
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"models-{namespace}"[:60].rstrip("-")},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadOnlyMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "local": {"path": str(cluster.model.parent)},
            "claimRef": {"namespace": namespace, "name": "models"},
            "nodeAffinity": {
                "required": {
                    "nodeSelectorTerms": [
                        {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["n1"]}]}
                    ]
                }
            },
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "resources": {"requests": {"storage": "1Gi"}},
            "volumeName": volume["metadata"]["name"],  # type: ignore[index]
        },
    }
    cluster.kubectl.apply(volume)
    try:
        cluster.kubectl.apply(claim, namespace)
        source = f"pvc://models/{cluster.model.name}"
        instances = [create("claim-a", source=source, runners=2), create("claim-b", source=source, runners=1)]
        for instance in instances:
            instance.wait_ready()
            with client(cluster, instance) as llm:
                for question, answer in list(questions.answers.items())[:3]:
                    assert ask(llm, instance.name, question) == answer
    finally:
        cluster.kubectl.run("delete", "pv", volume["metadata"]["name"], "--wait=false")  # type: ignore[index]
