"""What is slow is not frozen: a long step, a slow disk, a cold page cache, a busy node. No false alarm."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import LoadModel, StartWarmup
from mlx_runner.supervisor.watch import IDLE_CPU_SECONDS, POLL_SECONDS, read_process

from .faulting import ENVIRONMENT, FAULTY_ENGINE, ask, met
from .supervisors import Group, group

S = RunnerState
LONG = IDLE_CPU_SECONDS + 3 * POLL_SECONDS
"""Seconds: longer than a frozen engine is given."""
CPU_CGROUPS = Path("/sys/fs/cgroup/cpu")


@pytest.fixture
async def pair(tmp_path: Path, models: Path) -> AsyncIterator[Group]:
    async with group(tmp_path, 2, engine=FAULTY_ENGINE, models=models, **ENVIRONMENT) as instance:
        yield instance


def calm(instance: Group) -> None:
    for pod in instance.pods:
        assert all(r.failure is None for r in pod.reports), pod.log
        assert pod.report.epoch == 1


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_step_that_computes_for_long_is_none(pair: Group, rank: int) -> None:
    await pair.ready()
    answer = await ask(pair)
    pair.pods[rank].plan(at="step", do="compute", seconds=LONG)
    began = time.monotonic()
    assert await ask(pair, 1) == answer[:1]
    assert time.monotonic() - began > LONG, "the step was not long at all"
    pair.pods[rank].plan()
    assert await ask(pair) == answer
    calm(pair)


async def test_a_slow_disk_makes_a_long_load_and_nothing_else(pair: Group) -> None:
    await pair.create()
    await pair.download()
    await pair.connect()
    pair.pods[1].plan(at="read", do="slow", seconds=LONG / 2)
    began = time.monotonic()
    for pod in pair.pods:
        await pod.send(LoadModel())
    await pair.pods[1].state(S.LOADED, 1)
    assert time.monotonic() - began > LONG, "the load was not slow at all"
    pair.pods[1].plan()
    await pair.all(StartWarmup(), S.READY, 1)
    assert await ask(pair)
    calm(pair)


async def test_an_engine_that_waits_for_a_page_from_the_disk_is_waited_for(pair: Group, tmp_path: Path) -> None:
    """State D, for real: while it computes, as with swapped-out pages or a cold page cache of its libraries."""
    await pair.ready()
    answer = await ask(pair)
    fifo = tmp_path / "disk"
    os.mkfifo(fifo)
    victim = pair.pods[1]
    (engine,) = victim.engines()
    victim.plan(at="step", do="disk", fifo=str(fifo))
    asked = asyncio.create_task(ask(pair))
    await met(lambda: (p := read_process(engine, threads=True)) is not None and p.disk, "the engine is in state D")
    await asyncio.sleep(LONG)
    process = read_process(engine, threads=True)
    assert process is not None and process.disk
    with fifo.open("wb"):
        assert await asked == answer
    calm(pair)


async def test_an_engine_that_is_stopped_and_continued_all_the_time_is_only_slow(pair: Group) -> None:
    """A duty cycle of a half: what an overcommitted or checkpointing host does to a process."""
    await pair.ready()
    answer = await ask(pair, 200)
    (engine,) = pair.pods[1].engines()
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        asked = asyncio.create_task(ask(pair, 200))
        while not asked.done():
            os.kill(engine, signal.SIGSTOP)
            await asyncio.sleep(0.1)
            os.kill(engine, signal.SIGCONT)
            await asyncio.sleep(0.1)
        assert await asked == answer
    calm(pair)


@pytest.fixture
def tight_quota() -> Iterator[Path]:
    """A version 1 CPU cgroup of a twentieth of a core."""
    directory = CPU_CGROUPS / f"mlx-operator-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and a writable version 1 CPU cgroup: {error}")
    try:
        (directory / "cpu.cfs_period_us").write_text("100000")
        (directory / "cpu.cfs_quota_us").write_text("5000")
        yield directory
    finally:
        for pid in (directory / "cgroup.procs").read_text().split():
            (CPU_CGROUPS / "cgroup.procs").write_text(pid)
        directory.rmdir()


async def test_an_engine_with_a_twentieth_of_a_core_is_only_slow(pair: Group, tight_quota: Path) -> None:
    await pair.ready()
    answer = await ask(pair, 20)
    (engine,) = pair.pods[1].engines()
    (tight_quota / "cgroup.procs").write_text(str(engine))
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        assert await ask(pair, 20) == answer
    throttled = dict(line.split() for line in (tight_quota / "cpu.stat").read_text().splitlines())
    assert int(throttled["nr_throttled"]) > 0, "the quota was never felt"
    (CPU_CGROUPS / "cgroup.procs").write_text(str(engine))
    calm(pair)
