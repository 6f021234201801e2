"""Installs the charts on a cluster with helm, as a user would. Shared by the demo and the tests."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "mlx-operator-system"
RELEASE = "mlx-operator"
HELM_SECONDS = 180.0


class DeployError(Exception):
    """helm's own words."""


@dataclass(frozen=True)
class Helm:
    """One helm program for one cluster."""

    program: str
    kubeconfig: Path
    context: str | None = None

    def run(self, *arguments: str) -> str:
        """Output of a command.

        Raises:
            DeployError: it failed; with its error text.
        """
        context = [f"--kube-context={self.context}"] if self.context else []
        argv = [self.program, f"--kubeconfig={self.kubeconfig}", *context, *arguments]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=HELM_SECONDS + 30, check=False)
        if done.returncode != 0:
            raise DeployError(f"helm {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return done.stdout

    def install_crds(self) -> None:
        """Install or upgrade the CRDs."""
        self.run("upgrade", "--install", f"{RELEASE}-crds", str(ROOT / "helm" / "mlx-operator-crds"))

    def install_operator(self, values: Mapping[str, str]) -> None:
        """Install or upgrade the operator and wait until it is ready."""
        settings = [f"--set={key}={value}" for key, value in values.items()]
        chart = str(ROOT / "helm" / "mlx-operator")
        where = [f"--namespace={NAMESPACE}", "--create-namespace", "--wait", f"--timeout={HELM_SECONDS:.0f}s"]
        self.run("upgrade", "--install", RELEASE, chart, *where, *settings)


def image_values(operator: str, runner: str) -> dict[str, str]:
    """Chart values for two image references; images on the nodes are never pulled anew."""
    values: dict[str, str] = {}
    for key, reference in (("image", operator), ("runner.image", runner)):
        repository, _, tag = reference.rpartition(":")
        values |= {f"{key}.repository": repository, f"{key}.tag": tag, f"{key}.pullPolicy": "IfNotPresent"}
    return values


def say(text: str) -> None:
    """Progress for a person."""
    print(text, file=sys.stderr, flush=True)
