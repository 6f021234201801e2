"""Follows the report streams of an instance's runners, as the operator does: every state, in order."""

import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_operator_api import names
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport
from tests.node.instance import Instance
from tests.node.kube import wait_for


@dataclass
class Stream:
    """All reports of one pod since the stream was opened, the present one first."""

    rank: int
    reports: list[RunnerReport] = field(default_factory=list)
    ended: bool = False

    def states(self, epoch: int) -> list[RunnerState]:
        """States of an epoch in the order seen, repeats left out."""
        states: list[RunnerState] = []
        for report in self.reports:
            if report.epoch == epoch and (not states or states[-1] is not report.state):
                states.append(report.state)
        return states

    def last(self) -> RunnerReport | None:
        """The newest report."""
        return self.reports[-1] if self.reports else None


def _follow(stream: Stream, url: str, token: str, stop: threading.Event, deadline: float) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    while not stop.is_set() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:
                for line in answer:
                    stream.reports.append(RunnerReport.model_validate_json(line))
                    if stop.is_set():
                        return
                stream.ended = True
                return
        except OSError:
            stop.wait(0.05)  # the supervisor does not listen yet, or the pod is gone


@contextmanager
def following(cluster: Any, instance: Instance, ranks: int, seconds: float = 300) -> Iterator[dict[int, Stream]]:
    """Streams by rank, all of them open: whatever is asked for from now on is seen from its beginning.

    Nothing is said again: of an epoch that the operator has begun by itself, states may be missing.
    """
    stop = threading.Event()
    streams = {rank: Stream(rank) for rank in range(ranks)}
    with ExitStack() as stack:
        threads = []
        pods = wait_for(
            "all pods have an address",
            lambda: (
                p if len(p := instance.pods()) == ranks and all(x["status"].get("podIP") for x in p.values()) else None
            ),
            120,
        )
        token = bearer_token(instance)
        for rank, pod in pods.items():
            local = stack.enter_context(cluster.forward(pod["status"]["podIP"], names.CONTROL_PORT))
            url = f"http://{local[0]}:{local[1]}/reports"
            thread = threading.Thread(
                target=_follow, args=(streams[rank], url, token, stop, time.monotonic() + seconds), daemon=True
            )
            thread.start()
            threads.append(thread)
        try:
            for stream in streams.values():
                wait_for(f"the reports of rank {stream.rank} are followed", stream.last, 60)
            yield streams
        finally:
            stop.set()
    for thread in threads:
        thread.join(timeout=10)


def bearer_token(instance: Instance) -> str:
    """The instance's token, as an administrator can read it."""
    import base64

    secrets = instance.kubectl.items("secrets", instance.namespace, f"{names.INSTANCE_LABEL}={instance.name}")
    assert secrets, "the instance has no token Secret"
    return base64.b64decode(secrets[0]["data"][names.TOKEN_KEY]).decode()


def wait_state(streams: dict[int, Stream], rank: int, epoch: int, state: RunnerState, timeout: float = 60) -> None:
    """Wait until a rank reported a state in an epoch."""
    stream = streams[rank]

    def reached() -> bool:
        return any(r.epoch >= epoch and r.state is state for r in list(stream.reports))

    # States last milliseconds: whoever waits for one wants to act in it.
    wait_for(f"rank {rank} reports {state} in epoch {epoch}", reached, timeout, poll=0.002)
