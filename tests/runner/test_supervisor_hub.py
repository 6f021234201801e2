"""DownloadModel from a hub, by real supervisors: the commit early, progress, patience to the deadline, kills."""

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.tasks import DownloadModel, LoadModel, StartWarmup, TaskPhase
from tests.hub import Fault, Hub, Kind, serving
from tests.runner.downloads import ADAPTER, ADAPTER_NAME, NAME, SOURCE, hub_of, write_repository
from tests.runner.supervisors import Group, Pod, group
from tests.runner.test_adapters import make as make_adapter

ENDED = (TaskPhase.COMPLETE, TaskPhase.FAILED)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    found, _ = hub_of(write_repository(tmp_path / "model"))
    async with serving(found):
        yield found


def environment(hub: Hub, cache: Path, **more: str) -> dict[str, Any]:
    cache.mkdir(exist_ok=True)
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1", names.ENV_CACHE_DIR: str(cache), **more}


def downloads(pod: Pod) -> list[int]:
    """Pids of the download children of a supervisor."""
    found = []
    for pid in pod.engines():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except FileNotFoundError:
            continue
        if b"mlx_runner.download" in line:
            found.append(pid)
    return found


def weights(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("models--*/snapshots/*/*.safetensors")}


async def fetched(instance: Group, epoch: int = 1) -> None:
    """As the operator does it: rank 0 resolves, the others are told its commit."""
    first, *others = instance.pods
    await first.send(DownloadModel(), epoch)
    known = await first.until(lambda r: r.epoch == epoch and r.model is not None, "a revision")
    assert known.model is not None
    for pod in others:
        told = DownloadModel(revision=known.model.revision, adapter_revision=known.model.adapter_revision)
        await pod.send(told, epoch)
    for pod in instance.pods:
        outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, epoch, *ENDED)
        assert outcome.phase is TaskPhase.COMPLETE, outcome.message


async def test_two_ranks_use_one_commit_although_the_branch_moves_between_them(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 200_000
    async with group(tmp_path, 2, **environment(hub, tmp_path / "cache")) as instance:
        await instance.create(source=SOURCE)
        await instance.pods[0].send(DownloadModel())
        report = await instance.pods[0].until(lambda r: r.model is not None, "a revision")
        assert not report.model_available
        assert report.model is not None
        commit = report.model.revision
        assert commit == hub.repositories[NAME].branches["main"]
        hub.repositories[NAME].push(write_repository(tmp_path / "newer", salt=9))
        await instance.pods[1].send(DownloadModel(revision=commit))
        for pod in instance.pods:
            await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, TaskPhase.COMPLETE)
        facts = [pod.report.model for pod in instance.pods]
        assert facts[0] == facts[1]
        assert facts[0] is not None
        assert facts[0].revision == commit
        percents = [r.download_percent for r in instance.pods[0].reports if r.download_percent is not None]
        assert percents == sorted(percents)
        assert percents[-1] == 100
        assert len(set(percents)) > 3
        assert instance.pods[0].report.download_bytes


async def test_a_hub_that_is_down_to_the_deadline_is_told_as_unreachable_with_its_last_word(
    hub: Hub, tmp_path: Path
) -> None:
    hub.faults.append(Fault(kind=Kind.STATUS, status=503, path="/cdn-lfs/.*embed"))
    async with group(tmp_path, 1, **environment(hub, tmp_path / "cache")) as instance:
        instance.deadlines = instance.deadlines.model_copy(update={"download": 12.0})
        await instance.create(source=SOURCE)
        pod = instance.pods[0]
        await pod.send(DownloadModel())
        report = await pod.until(lambda r: r.download_trouble is not None, "a trouble")
        assert report.download_trouble == "model-embed.safetensors: HTTP 503"
        outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, *ENDED)
        assert (outcome.phase, outcome.reason) == (TaskPhase.FAILED, Reason.MODEL_UNREACHABLE)
        assert outcome.message is not None
        assert outcome.message.startswith("the model was not present and verified within 12 s: ")
        assert outcome.message.endswith("% done; last: model-embed.safetensors: HTTP 503")
        assert "download: model-embed.safetensors: HTTP 503; again in 0.5 s" in pod.log
        assert downloads(pod) == []
        hub.faults.clear()
        await pod.send(DownloadModel(), attempt=2)
        outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, *ENDED, attempt=2)
        assert outcome.phase is TaskPhase.COMPLETE, outcome.message
        assert pod.report.download_trouble is None


async def test_a_slow_hub_at_the_deadline_is_a_timeout(hub: Hub, tmp_path: Path) -> None:
    hub.bytes_per_second = 2_000
    async with group(tmp_path, 1, **environment(hub, tmp_path / "cache")) as instance:
        instance.deadlines = instance.deadlines.model_copy(update={"download": 4.0})
        await instance.create(source=SOURCE)
        await instance.pods[0].send(DownloadModel())
        outcome = await instance.pods[0].outcome(TaskName.DOWNLOAD_MODEL, 1, *ENDED)
        assert (outcome.phase, outcome.reason) == (TaskPhase.FAILED, Reason.DOWNLOAD_TIMEOUT)
        assert "last:" not in (outcome.message or "")


async def test_a_killed_download_is_told_and_the_next_attempt_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault(kind=Kind.STALL, path="/cdn-lfs/.*embed", after=30_000, times=1))
    async with group(tmp_path, 1, **environment(hub, tmp_path / "cache")) as instance:
        await instance.create(source=SOURCE)
        pod = instance.pods[0]
        await pod.send(DownloadModel())
        await hub.until(lambda: written(tmp_path) == [30_000])
        (child,) = downloads(pod)
        os.kill(child, signal.SIGKILL)
        outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, *ENDED)
        assert outcome.reason is Reason.MODEL_UNREACHABLE
        assert outcome.message == "the download killed by signal 9 (SIGKILL) without a result"
        await pod.send(DownloadModel(), attempt=2)
        outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, *ENDED, attempt=2)
        assert outcome.phase is TaskPhase.COMPLETE, outcome.message
        (path,) = (tmp_path / "cache").glob("models--org--tiny/snapshots/*/model-embed.safetensors")
        assert hub.sent("embed") == path.stat().st_size


def written(tmp_path: Path) -> list[int]:
    """Bytes on disk of each file that is not whole yet."""
    blobs = tmp_path / "cache" / "models--org--tiny" / "blobs"
    return [file.stat().st_size for file in blobs.glob("*.incomplete")]


async def test_a_shutdown_ends_a_download_that_hangs(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault(kind=Kind.STALL, path="/cdn-lfs/.*embed", after=10))
    async with group(tmp_path, 1, **environment(hub, tmp_path / "cache")) as instance:
        await instance.create(source=SOURCE)
        pod = instance.pods[0]
        await pod.send(DownloadModel())
        await pod.until(lambda r: r.model is not None, "a revision")
        await instance.shut_down()
        assert downloads(pod) == []


async def test_a_pipeline_serves_from_what_each_rank_fetched(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    """Real MLX: each rank loads its layers from its own cache, and one of them lacks a file of the other."""
    found, repository = hub_of(tiny("llama"))
    pods = [Pod(rank, tmp_path / f"pod-{rank}", tmp_path, engine=None) for rank in (0, 1)]
    instance = Group(pods)
    async with serving(found):
        try:
            for pod in pods:
                await pod.start(**environment(found, tmp_path / f"cache-{pod.rank}"))
            await instance.create(source=SOURCE)
            await fetched(instance)
            await instance.connect()
            await instance.all(LoadModel(), RunnerState.LOADED, 1)
            await instance.all(StartWarmup(), RunnerState.READY, 1)
        finally:
            for pod in pods:
                await pod.stop()
    everything = {name for name in repository.files() if name.endswith(".safetensors")}
    assert weights(tmp_path / "cache-0") == everything
    assert weights(tmp_path / "cache-1") == {"model-00001-of-00002.safetensors"}


async def test_a_pipeline_serves_with_an_adapter_that_came_from_the_hub_too(
    tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    """Real MLX, up to Ready: each rank resolved the adapter to one commit, fetched, verified and fused it."""
    model = tiny("llama")
    found, _ = hub_of(model, adapter=make_adapter(tmp_path / "adapter", model))
    async with (
        serving(found),
        group(tmp_path, 2, engine=None, **environment(found, tmp_path / "cache")) as instance,
    ):
        await instance.create(source=SOURCE, adapter=ADAPTER)
        await fetched(instance)
        await instance.connect()
        await instance.all(LoadModel(), RunnerState.LOADED, 1)
        await instance.all(StartWarmup(), RunnerState.READY, 1)
        for pod in instance.pods:
            assert pod.report.note is not None
            assert "lora adapter of rank 4 fused into the weights" in pod.report.note
            assert pod.report.model is not None
            assert pod.report.model.adapter_revision == found.repositories[ADAPTER_NAME].branches["main"]


async def test_an_adapter_that_is_not_there_fails_the_download_and_not_the_runner(hub: Hub, tmp_path: Path) -> None:
    async with group(tmp_path, 1, **environment(hub, tmp_path / "cache")) as instance:
        await instance.create(source=SOURCE, adapter="pvc://adapters/mine")
        pod = instance.pods[0]
        await pod.send(DownloadModel())
        outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, *ENDED)
        assert (outcome.phase, outcome.reason) == (TaskPhase.FAILED, Reason.MODEL_NOT_FOUND)
        assert outcome.message == f"spec.model.adapter: {names.ADAPTER_MOUNT}/mine (claim adapters) does not exist"
        assert pod.report.state is RunnerState.IDLE
