"""The kernel's OOM killer, for real: a memory cgroup around a supervisor whose engine eats without end."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.tasks import CreateRunner, DownloadModel, LoadModel, TaskPhase

from .supervisors import SOURCE, Pod, write_model

LIMIT = 384 * 1024 * 1024
ROOT = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A version 1 memory cgroup with a limit."""
    directory = ROOT / f"mlx-operator-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and a writable version 1 memory cgroup: {error}")
    try:
        (directory / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield directory
    finally:
        directory.rmdir()


async def test_an_engine_that_the_kernel_killed_for_memory_is_told_apart_from_other_kills(
    tmp_path: Path, memory_cgroup: Path
) -> None:
    write_model(tmp_path / "models/tiny")
    pod = Pod(0, tmp_path, tmp_path / "models")
    pod.prefix = ["sh", "-c", f'echo $$ > {memory_cgroup}/cgroup.procs && exec "$@"', "sh"]
    try:
        await pod.start()
        assert pod.report.memory_limit_bytes == LIMIT
        await pod.send(CreateRunner(world_size=1, source=SOURCE, served_name="tiny"))
        await pod.state(RunnerState.IDLE, 1)
        await pod.send(DownloadModel())
        await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, TaskPhase.COMPLETE)
        pod.plan(eat="Load")
        await pod.send(LoadModel())
        report = await pod.state(RunnerState.FAILED, 1)
        assert report.failure is not None
        assert report.failure.reason is Reason.OUT_OF_MEMORY
        assert report.failure.message == (
            "engine killed by signal 9 (SIGKILL) in RunnerLoading, memory limit 384Mi, oom_kill 1"
        )
        assert await pod.status("/healthz") == 200
    finally:
        await pod.stop()
