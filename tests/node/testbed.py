"""The cluster with our operator on it, and the handles that the tests need."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.demo_model.train import QUESTIONS
from tests.cluster import oci
from tests.cluster.audit import AuditLog, Request
from tests.cluster.cluster import Cluster
from tests.cluster.deploy import NAMESPACE, RELEASE, Helm, image_values
from tests.node.chat import Questions
from tests.node.kube import Kubectl, wait_for

OPERATOR_IMAGE = "localhost/mlx-operator:dev"
RUNNER_IMAGE = "localhost/mlx-runner:dev"
MODEL_IMAGE = "localhost/demo-model:1"
OPERATOR_SELECTOR = f"app.kubernetes.io/name={RELEASE}"


class Testbed:
    """A two-node cluster, the charts installed, images loaded. Unknown attributes are the cluster's own."""

    __test__ = False

    def __init__(self, cluster: Cluster, programs: Path, model: Path) -> None:
        self._cluster = cluster
        self.model = model
        self.kubectl = Kubectl(programs / "kubectl", cluster.kubeconfig)
        self.helm = Helm(str(programs / "helm"), cluster.kubeconfig)
        self.audit = AuditLog(cluster.audit_log)
        self.operator_user = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    # -- the operator
    def install_operator(self, runner_image: str = RUNNER_IMAGE) -> None:
        """Helm upgrade --install with these images."""
        self.helm.install_operator(image_values(OPERATOR_IMAGE, runner_image))

    def operator_pods(self) -> list[dict[str, Any]]:
        """Pods of the operator that are not on their way out."""
        pods = self.kubectl.items("pods", NAMESPACE, OPERATOR_SELECTOR)
        return [p for p in pods if not p["metadata"].get("deletionTimestamp")]

    def operator_node(self) -> str:
        """The node that the operator runs on."""
        return str(self.operator_pods()[0]["spec"]["nodeName"])

    def operator_pids(self) -> list[int]:
        """Host pids of the operator's processes."""
        found = []
        for pod in self.operator_pods():
            found += self._cluster.container_pids(pod["spec"]["nodeName"], pod["metadata"]["uid"])
        return [pid for pid, _ in found]

    def kill_operator(self, *, pids: Sequence[int] = (), wait: bool = True) -> None:
        """SIGKILL to the operator, no goodbye, no released Lease; then its pod is replaced.

        The pod goes too because the kubelet would back off before it starts a killed container again.
        """
        old = {p["metadata"]["uid"] for p in self.operator_pods()} if not pids else set()
        for pid in pids or self.operator_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        old = old or {p["metadata"]["uid"] for p in self.operator_pods()}
        self.kubectl.run("delete", "pod", "-n", NAMESPACE, "-l", OPERATOR_SELECTOR, "--grace-period=0", "--force")
        if wait:
            self.wait_operator_seeded(old)

    def wait_operator_seeded(self, old: set[str] | None = None) -> None:
        """Wait until an operator pod that is not one of the old is Ready: its store is seeded."""

        def ready() -> bool:
            return any(
                p["metadata"]["uid"] not in (old or ())
                and any(c["type"] == "Ready" and c["status"] == "True" for c in p["status"].get("conditions", []))
                for p in self.operator_pods()
            )

        wait_for("an operator pod is Ready", ready, 90)

    # -- what the API server saw
    def writes(self, since: int) -> list[Request]:
        """Writes of the operator after a mark, Lease renewals aside."""
        return self.audit.writes(since, user=self.operator_user)

    def status_writes(self, namespace: str, name: str, since: int = 0) -> list[Request]:
        """Status writes of one instance that succeeded."""
        found = self.audit.requests(since, verbs={"patch", "update"}, resources={"modelinstances/status"})
        return [r for r in found if (r.namespace, r.name, r.code) == (namespace, name, 200)]

    def quiet(self, seconds: float) -> None:
        """Let this much time pass: the window over which something must not happen."""
        time.sleep(seconds)

    def settle(self, seconds: float = 3.0, timeout: float = 60) -> None:
        """Wait until the operator wrote nothing for a while."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            mark = self.audit.mark()
            self.quiet(seconds)
            if not self.writes(mark):
                return
        raise AssertionError(f"the operator still writes after {timeout:.0f} s")

    def refused(self) -> list[Request]:
        """Requests of the operator that its rights did not cover.

        A namespace that is going refuses what is new in it, whatever the rights.
        """
        refused = [r for r in self.audit.requests(user=self.operator_user) if r.code in (401, 403)]
        return [r for r in refused if "NamespaceTerminating" not in r.causes]

    def node_ready(self, node: str) -> bool:
        """Whether a node's Ready condition is True."""
        found = self.kubectl.get("node", node) or {}
        conditions = found.get("status", {}).get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    # -- images
    def tag_runner_image(self, tag: str) -> str:
        """The runner image under another tag on every node; returns its name."""
        name = f"{RUNNER_IMAGE.rpartition(':')[0]}:{tag}"
        for node in self._cluster.nodes():
            argv = node.ctr("images", "tag", "--force", RUNNER_IMAGE, name)
            subprocess.run(argv, check=True, capture_output=True, timeout=60)
        return name

    def broken_model(self, kind: str) -> str:
        """An image of the demo model with one fault (`empty`, `truncate`, `architecture`); returns its source."""
        name = f"localhost/demo-model:{kind}"
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "model"
            shutil.copytree(self.model, directory)
            _BREAK[kind](directory)
            layout = Path(folder) / "layout"
            oci.write_image(layout, name, lambda tar: oci.tar_folder(directory, tar), {})
            self.load_image(layout)
        return f"oci://{name}"


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "README").write_text("no model here\n")


def _truncate(directory: Path) -> None:
    path = directory / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(data[: 8 + header + 1000])


def _architecture(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "foobar9000"}))


_BREAK: dict[str, Callable[[Path], None]] = {"empty": _empty, "truncate": _truncate, "architecture": _architecture}


def answers_of_one_process(model: Path) -> Questions:
    """What a single plain mlx-lm process answers, checked against what the model was taught."""
    questions = _one_process(model)
    taught = {pair["question"]: pair["answer"] for pair in json.loads(QUESTIONS.read_text())}
    assert questions.answers == taught, "the demo model does not answer as taught, even in one process"
    return questions


def answers_with_adapter(model: Path, adapter: Path) -> Questions:
    """What it answers with a random adapter, which is made here."""
    _run(Path(__file__).with_name("random_adapter.py"), model, adapter)
    return _one_process(model, adapter)


def _one_process(model: Path, *adapter: Path) -> Questions:
    rows = json.loads(_run(Path(__file__).with_name("single_process.py"), model, QUESTIONS, *adapter))
    answers = {question: answer for question, answer, _ in rows}
    return Questions(answers, {question: tokens for question, _, tokens in rows})


def _run(script: Path, *arguments: Path) -> str:
    argv = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
