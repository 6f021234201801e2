"""Adapters from a hub: by the same way as models, and every trouble names the field of the spec."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from tests.hub import Fault, Kind, Repository, serving
from tests.runner.downloads import ADAPTER, ADAPTER_NAME, NAME, Pods, hub_of, pods, write_adapter, write_repository
from tests.runner.supervisors import write_model

FIELD = "spec.model.adapter: "
WEIGHTS = "adapters.safetensors"
LARGE = f"/cdn-lfs/{ADAPTER_NAME}"


@pytest.fixture
async def pod(tmp_path: Path) -> AsyncIterator[Pods]:
    """Children on one cache, with a hub that has a model and an adapter."""
    hub, _ = hub_of(write_repository(tmp_path / "model"), adapter=write_adapter(tmp_path / "adapter"))
    async with serving(hub), pods(hub, tmp_path) as started:
        yield started


def repository(pod: Pods) -> Repository:
    return pod.hub.repositories[ADAPTER_NAME]


async def test_only_the_two_files_of_an_adapter_are_fetched_and_both_commits_are_told(
    pod: Pods, tmp_path: Path
) -> None:
    child = await pod.start(adapter=ADAPTER)
    found = await child.found()
    assert found.adapter is not None
    assert {path.name for path in found.adapter.iterdir()} == {"adapter_config.json", WEIGHTS}
    assert (found.adapter / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()
    assert found.adapter.parent.parent == pod.cache / "models--org--adapter"
    model = pod.hub.repositories[NAME]
    commits = (model.branches["main"], repository(pod).branches["main"])
    assert (found.facts.revision, found.facts.adapter_revision) == commits
    plain = await (await pod.start()).found()
    assert (plain.facts.adapter_revision, plain.path) == (None, found.path)
    assert plain.facts.digest != found.facts.digest
    percents = child.percents()
    assert percents == sorted(percents)
    sizes = [path.stat().st_size for path in (*found.path.iterdir(), *found.adapter.iterdir())]
    assert {total for _, total in percents if total} == {sum(sizes)}


async def test_all_ranks_have_the_same_digest_and_a_pinned_commit_stays(pod: Pods, tmp_path: Path) -> None:
    commit = repository(pod).branches["main"]
    first = await (await pod.start(adapter=ADAPTER, rank=0, world_size=2)).found()
    repository(pod).push(write_adapter(tmp_path / "newer", size=20_000))
    second = await (await pod.start(adapter=ADAPTER, adapter_revision=commit, rank=1, world_size=2)).found()
    assert first.facts == second.facts
    newer = await (await pod.start(adapter=ADAPTER)).found()
    assert newer.facts.adapter_revision != commit
    assert newer.facts.digest != first.facts.digest


async def test_a_model_on_a_claim_can_have_an_adapter_from_the_hub(pod: Pods, tmp_path: Path) -> None:
    write_model(tmp_path / "mounted")
    found = await (await pod.start(source="pvc://models/mounted", adapter=ADAPTER)).found()
    assert (found.path, found.facts.revision) == (tmp_path / "mounted", None)
    assert found.facts.adapter_revision == repository(pod).branches["main"]


async def test_a_download_of_an_adapter_that_was_killed_goes_on_where_it_was(pod: Pods, tmp_path: Path) -> None:
    pod.hub.faults.append(Fault(kind=Kind.STALL, path=LARGE, after=10_000, times=1))
    killed = await pod.start(adapter=ADAPTER)
    await killed.until(lambda: pod.hub.sent(LARGE) == 10_000, "a part of the adapter")
    partials = pod.cache / "models--org--adapter/blobs"
    await killed.until(lambda: [p.stat().st_size for p in partials.glob("*.incomplete")] == [10_000], "it on disk")
    await killed.kill()
    await (await pod.start(adapter=ADAPTER)).found()
    assert pod.hub.sent(LARGE) == (tmp_path / "adapter" / WEIGHTS).stat().st_size


async def test_two_ranks_on_one_cache_fetch_an_adapter_once(pod: Pods, tmp_path: Path) -> None:
    pod.hub.bytes_per_second = 100_000
    children = [await pod.start(adapter=ADAPTER, source="pvc://m/mounted", rank=rank, world_size=2) for rank in (0, 1)]
    write_model(tmp_path / "mounted")
    found = await asyncio.gather(*(child.found() for child in children))
    assert found[0] == found[1]
    assert len(pod.hub.requests(LARGE)) == 1


async def test_what_passes_is_waited_for(pod: Pods) -> None:
    pod.hub.faults.append(Fault(kind=Kind.STATUS, status=503, path=LARGE, times=2))
    child = await pod.start(adapter=ADAPTER)
    await child.found()
    assert child.troubles() == [f"{WEIGHTS}: HTTP 503"] * 2


async def test_a_file_that_came_wrong_twice_is_corrupt(pod: Pods) -> None:
    pod.hub.faults.append(Fault(kind=Kind.CORRUPT, path=LARGE))
    message = await (await pod.start(adapter=ADAPTER)).refused(Reason.MODEL_CORRUPT)
    assert message.startswith(f"{FIELD}{ADAPTER}@main: {WEIGHTS} came twice with sha256 ")
    assert pod.hub.sent(f"/cdn-lfs/{NAME}") == 0, "it is told before the model is fetched"


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("adapter_config.json", "has no adapter_config.json"),
        (WEIGHTS, f"has no {WEIGHTS} (adapter_model.safetensors is PEFT's form: convert it to mlx-lm's)"),
    ],
)
async def test_a_repository_that_has_no_adapter_is_told(pod: Pods, tmp_path: Path, gone: str, words: str) -> None:
    directory = write_adapter(tmp_path / "other")
    (directory / gone).rename(directory / "adapter_model.safetensors" if gone == WEIGHTS else directory / "x.md")
    commit = repository(pod).push(directory)
    message = await (await pod.start(adapter=ADAPTER)).refused(Reason.MODEL_NOT_FOUND)
    assert message == f"{FIELD}the adapter in {ADAPTER}@main at commit {commit[:12]} {words}"


async def test_a_revision_a_repository_and_a_right_that_are_missing_are_told_with_the_field(pod: Pods) -> None:
    message = await (await pod.start(adapter=f"{ADAPTER}@v9")).refused(Reason.MODEL_NOT_FOUND)
    assert message.startswith(f"{FIELD}{ADAPTER}@v9: ")
    assert message.endswith("no revision 'v9' of org/adapter: correct the part after @ in spec.model.adapter.source")
    token = {"HF_TOKEN": "hf_mine"}
    message = await (await pod.start(adapter="hf://org/none", environment=token)).refused(Reason.MODEL_NOT_FOUND)
    assert message.startswith(f"{FIELD}hf://org/none@main: {pod.hub.url} answers HTTP 404 for org/none")
    repository(pod).gated = True
    message = await (await pod.start(adapter=ADAPTER)).refused(Reason.MODEL_UNAUTHORIZED)
    assert message.startswith(f"{FIELD}{ADAPTER}@main: org/adapter is gated (HTTP 401")


async def test_no_room_for_an_adapter_is_told_with_the_numbers(pod: Pods) -> None:
    message = await (await pod.start(adapter=ADAPTER, cache_bytes=20_000)).refused(Reason.NO_SPACE)
    assert message.startswith(f"{FIELD}{ADAPTER}@main needs ")
    assert "spec.cache.sizeLimit leaves" in message


async def test_a_file_that_is_no_adapter_is_refused_before_the_model_is_fetched(pod: Pods, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "other")
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-10])
    repository(pod).push(directory)
    message = await (await pod.start(adapter=ADAPTER)).refused(Reason.MODEL_CORRUPT)
    assert message.startswith(f"{FIELD}the adapter in ") and "is damaged: tensor " in message
    assert pod.hub.sent(f"/cdn-lfs/{NAME}") == 0
