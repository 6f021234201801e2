"""kubectl for tests: what a user types, with deadlines and conditions instead of sleeps."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Object = dict[str, Any]
POLL_SECONDS = 0.1


class UnmetError(AssertionError):
    """A condition was not met in time; the message carries what was last seen."""


@dataclass(frozen=True)
class Kubectl:
    """One kubectl program for one cluster."""

    program: Path
    kubeconfig: Path

    def run(self, *arguments: str, stdin: str | None = None, timeout: float = 60, check: bool = True) -> str:
        """Standard output of a command; `subprocess.CalledProcessError` with its error text when it fails."""
        done = subprocess.run(
            [str(self.program), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def get(self, kind: str, name: str, namespace: str | None = None) -> Object | None:
        """An object, or None where there is none."""
        where = ["-n", namespace] if namespace else []
        text = self.run("get", kind, name, *where, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def items(self, kind: str, namespace: str, selector: str = "") -> list[Object]:
        """A list of objects."""
        where = ["-l", selector] if selector else []
        return list(json.loads(self.run("get", kind, "-n", namespace, *where, "-o", "json"))["items"])

    def apply(self, manifest: Object, namespace: str | None = None) -> str:
        """`kubectl apply` of one object."""
        where = ["-n", namespace] if namespace else []
        return self.run("apply", *where, "-f", "-", stdin=json.dumps(manifest))

    def patch(self, kind: str, name: str, namespace: str, patch: Object) -> str:
        """A merge patch."""
        return self.run("patch", kind, name, "-n", namespace, "--type=merge", "-p", json.dumps(patch))

    @contextmanager
    def namespace(self, name: str) -> Iterator[str]:
        """A namespace under PodSecurity `restricted`, gone afterwards."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        try:
            yield name
        finally:
            self.run("delete", "namespace", name, "--wait=false", check=False)


def wait_for(what: str, check: Callable[[], Any], timeout: float, poll: float = POLL_SECONDS) -> Any:
    """The first true value of `check`; polls, and says at the deadline what was last seen."""
    deadline = time.monotonic() + timeout
    while True:
        if value := check():
            return value
        if time.monotonic() > deadline:
            raise UnmetError(f"not within {timeout:.0f} s: {what}; last seen: {value!r}")
        time.sleep(poll)
