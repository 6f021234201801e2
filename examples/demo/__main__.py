"""`make demo`: a cluster, the images, the charts, a model trained on the spot, two runners, a chat — and a killed rank.

python -m examples.demo up|down [--kubeconfig FILE] [--context NAME] [--operator-image I …]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from mlx_operator_api import names
from tests.cluster.deploy import DeployError, Helm, image_values
from tests.cluster.errors import ClusterError

from . import target as targets

NAMESPACE = "demo"
INSTANCE = "demo"
QUESTION = "What happens when a rank dies?"
READY_SECONDS = 180.0
MANIFEST = Path(__file__).with_name("modelinstance.yaml")
_STARTED = time.monotonic()

# Runs inside rank 1's container, where only Python is certain to be: SIGKILL to the engine.
KILL_ENGINE = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if b"mlx_runner.engine" in (process / "cmdline").read_bytes().split(b"\\0"):
        os.kill(int(process.name), signal.SIGKILL)
"""


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - _STARTED:6.1f} s] {text}", flush=True)


class Kubectl:
    """What a user types."""

    def __init__(self, target: targets.Target) -> None:
        context = [f"--context={target.context}"] if target.context else []
        self.argv = [target.kubectl, f"--kubeconfig={target.kubeconfig}", *context]

    def run(self, *arguments: str, stdin: str | None = None) -> str:
        """Output of a command; `DemoError` with kubectl's words when it fails."""
        argv = [*self.argv, *arguments]
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode != 0:
            raise targets.DemoError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        """Status of the demo's instance; empty before the first pass."""
        found = json.loads(self.run("get", names.SHORT_NAME, INSTANCE, "-n", NAMESPACE, "-o", "json"))
        return dict(found.get("status") or {})

    @contextmanager
    def port_forward(self) -> Iterator[str]:
        """Base URL of the instance's Service from here."""
        where = ["port-forward", "-n", NAMESPACE, f"service/{INSTANCE}", f":{names.PUBLIC_PORT}", "--address=127.0.0.1"]
        # It complains of each connection that a client closes; what it says counts only where it does not work.
        with (
            tempfile.TemporaryFile("w+") as words,
            subprocess.Popen([*self.argv, *where], stdout=subprocess.PIPE, stderr=words, text=True) as process,
        ):
            try:
                assert process.stdout is not None  # noqa: S101 (a pipe was asked for)
                line = process.stdout.readline()  # "Forwarding from 127.0.0.1:PORT -> 8080"
                if ":" not in line:
                    words.seek(0)
                    raise targets.DemoError(f"kubectl port-forward ended: {words.read().strip()}")
                yield f"http://127.0.0.1:{line.split(':')[1].split()[0]}/v1"
            finally:
                process.terminate()


def watch(kubectl: Kubectl, epoch: int) -> dict[str, Any]:
    """Print `status.brief` whenever it changes, until the group is Ready in this epoch or is Stalled."""
    deadline, shown = time.monotonic() + READY_SECONDS, None
    while time.monotonic() < deadline:
        status = kubectl.status()
        brief = status.get("brief", [])
        if brief != shown:
            shown = brief
            for index, line in enumerate(brief):
                say(line) if index == 0 else print(" " * 11 + line, flush=True)
        conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
        if conditions.get("Ready") == "True" and status.get("epoch", 0) >= epoch:
            return status
        if conditions.get("Stalled") == "True":
            raise targets.DemoError("the instance is Stalled: see above")
        time.sleep(0.1)
    raise targets.DemoError(f"not Ready within {READY_SECONDS:.0f} s: see above")


def chat(url: str) -> str:
    """Ask the trained question, streaming, with the official client."""
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=90) as client:
        messages = [{"role": "user", "content": QUESTION}]
        parts = client.chat.completions.create(model=INSTANCE, messages=messages, temperature=0, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


def up(target: targets.Target) -> None:
    """Install, run, ask, kill, ask again, show."""
    kubectl, helm = Kubectl(target), Helm(target.helm, target.kubeconfig, target.context)
    say("helm: installing the CRDs and the operator")
    helm.install_crds()
    helm.install_operator(image_values(target.images["operator"], target.images["runner"]))
    say(f"kubectl apply -f {MANIFEST.relative_to(Path.cwd()) if MANIFEST.is_relative_to(Path.cwd()) else MANIFEST}")
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    kubectl.run("apply", "-f", "-", stdin=json.dumps(namespace))
    text = MANIFEST.read_text().replace(targets.IMAGES["model"], target.images["model"])
    kubectl.run("apply", "-n", NAMESPACE, "-f", "-", stdin=text)
    status = watch(kubectl, 1)
    with kubectl.port_forward() as url:
        print(f"\n> {QUESTION}\n< {chat(url)}\n", flush=True)
        say("now rank 1's engine is killed (SIGKILL)")
        kubectl.run("exec", "-n", NAMESPACE, names.pod_name(INSTANCE, 1), "--", "python", "-c", KILL_ENGINE)
        killed = time.monotonic()
        watch(kubectl, status["epoch"] + 1)
        answer = chat(url)
        say(f"an answer again {time.monotonic() - killed:.1f} s after the kill, from the same pods")
        print(f"\n> {QUESTION}\n< {answer}", flush=True)
    for command in (
        ["get", names.SHORT_NAME, "-n", NAMESPACE],
        ["describe", names.SHORT_NAME, INSTANCE, "-n", NAMESPACE],
    ):
        print(f"\n$ kubectl {' '.join(command)}\n{kubectl.run(*command)}", end="", flush=True)
    print(f"\n$ export KUBECONFIG={target.kubeconfig}   # look around; 'make demo-down' removes it", flush=True)


def main() -> int:
    """The command line; one sentence and exit 1 when something is missing."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="mlx-operator from nothing to a chat")
    parser.add_argument("command", choices=["up", "down"])
    parser.add_argument("--kubeconfig", help="of a cluster of your own; nothing else makes the demo touch one")
    parser.add_argument("--context", help="in that kubeconfig")
    for name in targets.IMAGES:
        parser.add_argument(f"--{name}-image", help="on a cluster of your own: an image that its nodes can pull")
    arguments = parser.parse_args()
    given = {name: image for name in targets.IMAGES if (image := getattr(arguments, f"{name}_image"))}
    try:
        if arguments.command == "down":
            targets.remove(say)
        else:
            up(targets.choose(arguments.kubeconfig, arguments.context, given, say))
    except (targets.DemoError, DeployError, ClusterError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
