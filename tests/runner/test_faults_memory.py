"""The kernel's OOM killer, for real: a memory cgroup around a supervisor whose engine eats without end."""

import asyncio
import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import LoadModel
from tests.faults import Fault, Layer, fault

from .faulting import ask, confirm, gone, met
from .supervisors import PATIENCE, Group, Pod, write_model

LIMIT = 384 * 1024 * 1024
ROOT = Path("/sys/fs/cgroup/memory")


@pytest.fixture
async def confined(tmp_path: Path, memory_cgroup: Path) -> AsyncIterator[Group]:
    """One pod inside that cgroup."""
    write_model(tmp_path / "models/tiny")
    pod = Pod(0, tmp_path, tmp_path / "models")
    pod.prefix = ["sh", "-c", f'echo $$ > {memory_cgroup}/cgroup.procs && exec "$@"', "sh"]
    try:
        await pod.start()
        yield Group([pod])
    finally:
        await pod.stop()


@pytest.fixture
def memory_cgroup(tmp_path: Path) -> Iterator[Path]:
    """A version 1 memory cgroup with a limit."""
    directory = ROOT / f"mlx-operator-test-{os.getpid()}-{tmp_path.name}"
    try:
        directory.mkdir()
    except (FileNotFoundError, PermissionError) as error:
        pytest.skip(f"needs root and a writable version 1 memory cgroup: {error}")
    try:
        (directory / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield directory
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    """The kernel lets go of a cgroup a moment after its last process."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            directory.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


OOM = Fault(
    id="engine-oom",
    what="the kernel kills an engine for memory (cgroup v1)",
    injected="a cgroup with a limit of 384 MiB, and an engine that eats without end while it loads",
    layer=Layer.STAND_IN,
    ranks=1,
    rank=0,
    state=RunnerState.LOADING,
    reason=Reason.OUT_OF_MEMORY,
    says="engine killed by signal 9 (SIGKILL) in RunnerLoading, memory limit 384Mi, oom_kill 1",
    others=None,
)


@fault(OOM)
async def test_an_engine_that_the_kernel_killed_for_memory_is_told_apart_from_other_kills(
    confined: Group, row: Fault
) -> None:
    pod = confined.pods[0]
    assert pod.report.memory_limit_bytes == LIMIT
    await confined.create()
    await confined.download()
    pod.plan(eat="Load")
    began, engines = time.monotonic(), pod.engines()
    await pod.send(LoadModel())
    await confirm(row, confined, began)
    await gone(engines)
    assert await pod.status("/healthz") == 200
    pod.plan()
    await confined.ready(2)


async def test_where_memory_gets_short_the_spare_goes_first_and_none_is_kept_any_more(confined: Group) -> None:
    pod = confined.pods[0]
    await confined.ready()
    await met(lambda: [oom_score(pid) for pid in pod.spares()] == [1000], "a spare engine, offered to the kernel")
    (used,), (spare,) = pod.engines(), pod.spares()
    # So slowly that what the spare gives back lasts until its end was seen.
    pod.plan(eat="Generate", bytes=1 << 20, pause=0.02)
    asked = asyncio.create_task(ask(confined))
    await met(lambda: "the kernel killed the spare engine for memory: none is kept any more" in pod.log, "its end")
    pod.plan()
    asked.cancel()
    killed = re.findall(r"engine killed by signal 9 \(SIGKILL\) pid=(\d+)", pod.log)
    assert int(killed[0]) == spare
    # What the spare gave back may be too little for an engine that goes on eating.
    with contextlib.suppress(ProcessLookupError):
        os.kill(used, signal.SIGKILL)
    await pod.state(RunnerState.FAILED, 1)
    await confined.ready(2)
    assert not pod.spares()


def oom_score(pid: int) -> int:
    """What the kernel adds to the badness of a process."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())
