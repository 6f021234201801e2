"""What every test of a fault asserts, and the operator's own decision on what was reported."""

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from mlx_operator.decide.observed import RunnerView
from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import GroupFailure
from mlx_operator_api.tasks import RunnerReport
from mlx_runner.supervisor.watch import Process, read_process
from tests.faults import Fault, Layer
from tests.unit import simulated_supervisor
from tests.unit.scenes import ready

from .supervisors import FAKE_ENGINE, PATIENCE, ROOT, Group, group

FAULTY_ENGINE = f"{sys.executable} {ROOT / 'tests/runner/faulty_engine.py'}"
BLAS = next(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0"), None)
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", **({"MLX_RUNNER_BLAS": str(BLAS)} if BLAS else {})}
PROMPT = "the runner holds one shard"
PROGRESS = re.compile(r"engine at step \d+, last progress \d+\.\d s ago")
"""Evidence that every failure of a runner with an engine carries."""
S = RunnerState


@contextlib.asynccontextmanager
async def instance_of(row: Fault, home: Path, models: Path, real: str | None = FAULTY_ENGINE) -> AsyncIterator[Group]:
    """The pods that a row needs, with the engine of its layer; `real`: None for the real one as it is."""
    engine = real if row.layer is Layer.GROUP else FAKE_ENGINE
    async with group(
        home, row.ranks, engine=engine, models=models if row.layer is Layer.GROUP else None, **ENVIRONMENT
    ) as instance:
        instance.sharding = row.sharding
        yield instance


async def ask(instance: Group, tokens: int = 8) -> str:
    """A greedy answer."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    pod = instance.pods[0]
    async with asyncio.timeout(PATIENCE), pod.http.post(pod.url("/v1/completions", names.PUBLIC_PORT), json=body) as r:
        assert r.status == 200, await r.text()
        return str((await r.json())["choices"][0]["text"])


@contextlib.asynccontextmanager
async def answering(instance: Group) -> AsyncIterator[None]:
    """Within it, a long answer is under way; what becomes of it is another test's business."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "stream": True}
    pod = instance.pods[0]
    async with pod.http.post(pod.url("/v1/completions", names.PUBLIC_PORT), json=body) as response:
        await asyncio.wait_for(response.content.readline(), PATIENCE)
        yield


def decision(reports: list[RunnerReport]) -> GroupFailure:
    """The operator's own rules on real reports: which rank is the cause, and which the consequence."""
    cluster = ready(len(reports))
    epoch = reports[0].epoch
    for report in reports:
        pod = cluster.pods[f"tiny-{report.rank}"]
        assert pod.supervisor is not None
        assert report.failure is not None
        failure = report.failure.model_copy(update={"epoch": cluster.status.epoch})
        identity = {"instance_uid": simulated_supervisor.UID, "incarnation": pod.supervisor.incarnation}
        told = report.model_copy(update={**identity, "epoch": cluster.status.epoch, "failure": failure})
        uid = pod.manifest["metadata"]["uid"]
        cluster.views[uid] = RunnerView(report=told, received=cluster.now, connected=True)
    cluster.reconcile(act=False)
    assert cluster.status.history, f"no failure of epoch {epoch}: {cluster.status.brief}"
    return cluster.status.history[0]


async def confirm(row: Fault, instance: Group, began: float, epoch: int = 1) -> list[RunnerReport]:
    """The cause is told as the row says and in time, the others as its consequence, and the operator agrees.

    Returns the reports of the ranks that failed.
    """
    causes = instance.pods if row.rank is None else [instance.pods[row.rank]]
    assert row.reason is not None
    for pod in causes:
        report = await pod.state(S.FAILED, epoch)
        seconds = time.monotonic() - began
        assert report.failure is not None
        row.check(report.failure.state, report.failure.reason, report.failure.message)
        if "cannot be started" not in row.says:
            assert PROGRESS.fullmatch(report.failure.diagnostics[0]), report.failure.diagnostics
    row.took(seconds)
    failed = causes if row.others is None else instance.pods
    reports = [await pod.state(S.FAILED, epoch) for pod in failed]
    if row.rank is None or row.others is None:
        return reports
    for report in reports:
        if report.rank != row.rank:
            assert report.failure is not None
            assert report.failure.reason is row.others, report.failure
    if row.others is not Reason.PEER_LOST:
        return reports  # each waits for the other: both words stand in status, neither is the other's consequence
    found = decision(reports)
    assert (found.rank, found.reason) == (row.rank, row.reason), found
    assert found.consequences == tuple(pod.rank for pod in instance.pods if pod.rank != row.rank)
    return reports


async def gone(pids: list[int]) -> None:
    """No process of these is left, no zombie either: its memory was given back."""
    await met(lambda: not [pid for pid in pids if read_process(pid)], f"the processes {pids} are gone")


async def at_rest(instance: Group) -> None:
    """The engines sleep: a worker hears of the end of an answer a moment after its client."""
    for pid in engines_of(instance):
        seen: list[Process | None] = []

        def sleeps(pid: int = pid, seen: list[Process | None] = seen) -> bool:
            seen.append(read_process(pid))
            last = seen[-5:]
            return len(last) == 5 and len(set(last)) == 1 and last[0] is not None and last[0].state == "S"

        await met(sleeps, f"engine {pid} is at rest")


async def met(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    try:
        async with asyncio.timeout(seconds):
            # What is looked at is the kernel's: there is no event to wait for.
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what}") from None


async def heals(instance: Group, epoch: int, dead: list[int]) -> None:
    """The next epoch works in the same pods, with one engine each and none of the old."""
    for pod in instance.pods:
        pod.plan()
    await instance.ready(epoch)
    await gone(dead)
    assert await ask(instance)
    for pod in instance.pods:
        assert len(pod.engines()) == 1
        assert not set(pod.engines()) & set(dead)
        assert not any(r.failure for r in pod.reports if r.epoch == epoch)


def engines_of(instance: Group) -> list[int]:
    return [pid for pod in instance.pods for pid in pod.engines()]


def send(pid: int, number: int) -> float:
    """A signal; the time at which it was sent."""
    began = time.monotonic()
    os.kill(pid, number)
    return began
