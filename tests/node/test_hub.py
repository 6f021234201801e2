"""Models from a hub on real nodes: each rank fetches its part, restarts need no hub, what lasts is told."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from tests.cluster.network import HUB, HUB_ADDRESS, Network
from tests.cluster.processes import Record, environment, spawn
from tests.node.chat import Questions, ask, client
from tests.node.instance import Instance, one_per_node
from tests.node.kube import wait_for
from tests.node.processes import kill_engine
from tests.node.testbed import Testbed, answers_with_adapter

ROOT = Path(__file__).resolve().parents[2]
PORT = 8090
URL = f"http://{HUB_ADDRESS}:{PORT}"
SOURCE = "hf://org/demo"


class NodeHub:
    """`python -m tests.hub` in the hub's network namespace: the nodes reach it, this machine only from inside."""

    def __init__(self, network: Network, record: Record) -> None:
        self._network = network
        self.record = record

    def _ask(self, method: str, path: str, body: str = "") -> str:
        script = (
            "import sys, urllib.request as u; method, url, body = sys.argv[1:]; "
            "print(u.urlopen(u.Request(url, body.encode() or None, method=method), timeout=20).read().decode())"
        )
        argv = [*self._network.enter(HUB), sys.executable, "-c", script, method, URL + path, body]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout

    def fail(self, *faults: dict[str, Any]) -> None:
        """The faults from now on (`tests.hub.Fault`)."""
        self._ask("PUT", "/_faults", json.dumps(faults))

    def sent(self, part: str) -> int:
        """Bytes sent of files whose path contains this."""
        return sum(
            int(request["sent"]) for request in json.loads(self._ask("GET", "/_served")) if part in request["path"]
        )


@pytest.fixture
def adapted(cluster: Testbed, tmp_path: Path) -> Questions:
    """org/adapter, for the hub; what one process answers with it."""
    return answers_with_adapter(cluster.model, tmp_path / "org/adapter")


@pytest.fixture
def hub(cluster: Testbed, tmp_path: Path) -> Iterator[NodeHub]:
    """A hub with the demo model as org/demo."""
    shutil.copytree(cluster.model, tmp_path / "org/demo")
    log = cluster.paths.log("models")
    log.unlink(missing_ok=True)
    record = spawn(
        [
            *cluster.network.enter(HUB),
            sys.executable,
            "-m",
            "tests.hub",
            tmp_path,
            "--host",
            HUB_ADDRESS,
            "--port",
            str(PORT),
        ],
        record=cluster.paths.record("models"),
        log=log,
        env={**environment(), "PYTHONPATH": str(ROOT)},
    )
    try:
        wait_for("the hub serves", lambda: "org/demo" in log.read_text(), 60)
        yield NodeHub(cluster.network, record)
    finally:
        record.stop()


def runner(name: str) -> dict[str, Any]:
    return {**one_per_node(name), "env": [{"name": "HF_ENDPOINT", "value": URL}]}


def test_each_node_fetches_its_part_and_a_restart_needs_no_hub(
    cluster: Testbed, hub: NodeHub, create: Callable[..., Instance], questions: Questions
) -> None:
    instance = create("hubbed", source=SOURCE, runners=2, runner=runner("hubbed"))
    status = instance.wait_ready()
    commit = status["model"]["revision"]
    assert len(commit) == 40
    size = sum(path.stat().st_size for path in cluster.model.glob("model*.safetensors"))
    assert status["model"]["bytes"] == size
    assert hub.sent(".safetensors") < 2 * size, "a rank fetched layers of the other one"
    question, answer = next(iter(questions.answers.items()))
    with client(cluster, instance) as openai:
        assert ask(openai, instance.name, question) == answer
        hub.record.stop()
        before = status["epoch"]
        kill_engine(cluster, instance, 1)
        status = instance.wait_ready(epoch=before + 1)
        assert status["model"]["revision"] == commit
        assert ask(openai, instance.name, question) == answer


def test_an_adapter_from_a_hub_is_fused_on_both_nodes(
    cluster: Testbed, adapted: Questions, hub: NodeHub, create: Callable[..., Instance], questions: Questions
) -> None:
    model = {"source": SOURCE, "adapter": {"source": "hf://org/adapter"}}
    instance = create("adapted", model=model, runners=2, runner=runner("adapted"))
    status = instance.wait_ready()
    assert status["model"]["adapter"]["source"] == "hf://org/adapter"
    assert len(status["model"]["adapter"]["revision"]) == 40
    loaded = instance.condition(ConditionType.LOADED)["message"]
    assert "lora adapter of rank 4 fused into the weights" in loaded
    assert "Adapter:" in instance.describe()
    with client(cluster, instance) as openai:
        for question, answer in adapted.answers.items():
            # mlx-lm shows special tokens, which it makes with this adapter now and then.
            assert ask(openai, instance.name, question, max_tokens=100) == re.sub(r"<\|\w+\|>", "", answer)
    assert adapted.answers != questions.answers


def test_a_gated_repository_is_told_and_picked_up_when_access_is_given(
    hub: NodeHub, create: Callable[..., Instance]
) -> None:
    hub.fail({"kind": "status", "status": 403, "error_code": "GatedRepo"})
    instance = create("gated", source=SOURCE, runners=1, runner=runner("gated"))
    stalled = instance.wait_condition(ConditionType.STALLED, "True", Reason.MODEL_UNAUTHORIZED)
    assert "org/demo is gated" in stalled["message"]
    assert "spec.model.credentialsSecretRef" in stalled["message"]
    hub.fail()
    instance.kubectl.run("annotate", "mi", instance.name, "-n", instance.namespace, f"{names.RETRY_ANNOTATION}=granted")
    instance.wait_ready()
    assert instance.status().get("restarts", 0) == 0
