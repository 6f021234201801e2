"""Which cluster the demo uses: one the user named; else kind where a Docker engine answers; else the local one.

It never touches a cluster that nobody named.
"""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import binaries, images
from tests.cluster.cluster import Cluster
from tests.cluster.deploy import ROOT

Say = Callable[[str], None]
NAME = "mlx-operator-demo"
KIND_CONFIG = """kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
nodes: [{role: control-plane}, {role: worker}, {role: worker}]
"""
IMAGES = {
    "operator": "localhost/mlx-operator:dev",
    "runner": "localhost/mlx-runner:dev",
    "model": "localhost/demo-model:1",
}


class DemoError(Exception):
    """What is missing, and what to do about it, in one sentence."""


@dataclass(frozen=True)
class Target:
    """A cluster whose nodes have, or can pull, the images."""

    kubeconfig: Path
    context: str | None
    kubectl: str
    helm: str
    images: dict[str, str]


def choose(kubeconfig: str | None, context: str | None, given: dict[str, str], say: Say) -> Target:
    """The target that the user's words lead to.

    Raises:
        DemoError: something that the chosen way needs is missing.
    """
    if kubeconfig or context:
        return named(kubeconfig, context, given)
    if docker_answers():
        return kind(say)
    return local(say)


def named(kubeconfig: str | None, context: str | None, given: dict[str, str]) -> Target:
    """A cluster that the user named; its nodes must be able to pull the images.

    Raises:
        DemoError: an image, a program or the file is missing.
    """
    if missing := sorted(set(IMAGES) - given.keys()):
        options = ", ".join(f"{name.upper()}_IMAGE=…" for name in missing)
        raise DemoError(f"on a cluster of your own the nodes pull the images: push them somewhere and add {options}")
    for program in ("kubectl", "helm"):
        if not shutil.which(program):
            raise DemoError(f"{program} is not on PATH: install it, or name no cluster to get one of the demo's own")
    path = Path(kubeconfig or "~/.kube/config").expanduser()
    if not path.exists():
        raise DemoError(f"KUBECONFIG={path} does not exist: name an existing file")
    return Target(path, context, "kubectl", "helm", given)


def docker_answers() -> bool:
    """Whether a Docker engine (not only its client) answers, with kind beside it."""
    if not (shutil.which("docker") and shutil.which("kind")):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=20).returncode == 0


def kind(say: Say) -> Target:
    """A kind cluster. Not run where this was developed: no Docker engine runs there."""
    if NAME not in _run("kind", "get", "clusters").split():
        say("kind: creating a cluster with two workers")
        _run("kind", "create", "cluster", "--name", NAME, "--config", "-", stdin=KIND_CONFIG)
    say("docker: building the images")
    _run("docker", "build", "-q", "-t", IMAGES["operator"], "-f", str(ROOT / "operator/Dockerfile"), str(ROOT))
    _run("docker", "build", "-q", "-t", IMAGES["runner"], "-f", str(ROOT / "runner_image/Dockerfile"), str(ROOT))
    model, _ = images.ensure_demo_model(say)
    _run("docker", "build", "-q", "-t", IMAGES["model"], "-f", "-", str(model), stdin="FROM scratch\nCOPY . /\n")
    for image in IMAGES.values():
        _run("kind", "load", "docker-image", image, "--name", NAME)
    kubeconfig = ROOT / ".venv" / "kind-kubeconfig"
    kubeconfig.write_text(_run("kind", "get", "kubeconfig", "--name", NAME))
    return Target(kubeconfig, None, "kubectl", "helm", IMAGES)


def local(say: Say) -> Target:
    """The two-node cluster of tests/cluster, with all images loaded."""
    programs = binaries.ensure(say)
    archives = [images.ensure_operator(say), images.ensure_runner(say), images.ensure_demo_model(say)[1]]
    say("cluster: two nodes, real Kubernetes, in network namespaces")
    cluster = Cluster(name="demo", nodes=2, progress=say)
    cluster.up()
    say("cluster: loading the images into the nodes")
    for archive in archives:
        cluster.load_image(archive)
    return Target(cluster.kubeconfig, None, str(programs / "kubectl"), str(programs / "helm"), IMAGES)


def remove(say: Say) -> None:
    """Remove the demo's own cluster, of whichever kind."""
    if docker_answers():
        _run("kind", "delete", "cluster", "--name", NAME)
        return
    Cluster(name="demo", nodes=2, progress=say).down()


def _run(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode != 0:
        raise DemoError(f"{' '.join(argv[:4])} … failed: {done.stderr.strip()[-600:]}")
    return done.stdout
