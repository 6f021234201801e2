"""The real kubectl, against the test's API server, as a user runs it."""

import json
import pathlib
import subprocess
from collections.abc import Mapping
from typing import Any

from mlx_operator_api import names
from tests.cluster.waiting import wait_until

CRD = f"{names.PLURAL}.{names.GROUP}"
SECONDS = 60.0


class Kubectl:
    """Runs kubectl; its discovery cache lies with the server, whose port another server may get later."""

    def __init__(self, program: pathlib.Path, kubeconfig: pathlib.Path) -> None:
        self._argv = [str(program), f"--kubeconfig={kubeconfig}", f"--cache-dir={kubeconfig.parent / 'kubectl-cache'}"]

    def attempt(self, *arguments: str, stdin: str | None = None) -> tuple[int, str]:
        """(exit status, output and error text) of a command."""
        done = subprocess.run(
            [*self._argv, *arguments],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return done.returncode, done.stdout.rstrip("\n")

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        """Output of a command that must succeed."""
        status, output = self.attempt(*arguments, stdin=stdin)
        assert status == 0, f"kubectl {' '.join(arguments)}: {output}"
        return output

    def apply(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> tuple[int, str]:
        """`kubectl apply` of one object."""
        flags = ["--dry-run=server"] if dry_run else []
        return self.attempt("apply", *flags, "-f", "-", stdin=json.dumps(manifest))

    def get(self, *arguments: str) -> Any:
        """`kubectl get … -o json`."""
        return json.loads(self.run("get", *arguments, "-o", "json"))

    def await_crd(self, name: str) -> None:
        """Wait until a CRD is served. `kubectl wait` fails at one that the API server has not looked at yet."""

        def established() -> bool:
            conditions = self.get("crd", name).get("status", {}).get("conditions") or ()
            return any((c["type"], c["status"]) == ("Established", "True") for c in conditions)

        wait_until(established, what=f"the CRD {name} is established", seconds=SECONDS)
