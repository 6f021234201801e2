"""Downloads from a hub: what a rank needs, once, verified, whatever the hub and the network do meanwhile."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir
from huggingface_hub.utils import WeakFileLock

from mlx_operator_api.tasks import Sharding
from tests.hub import Fault, Hub, Kind, Repository, serving
from tests.runner.downloads import NAME, SOURCE, Pods, hub_of, pods, write_repository

WEIGHTS = {f"model-{part}.safetensors" for part in ("embed", "last", "odd", *(f"layer-{i}" for i in range(4)))}
SMALL = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "model")


@pytest.fixture
async def pod(model: Path, tmp_path: Path) -> AsyncIterator[Pods]:
    """Children on one cache, with a hub that has the model."""
    hub, _ = hub_of(model)
    async with serving(hub), pods(hub, tmp_path) as started:
        yield started


def repository(hub: Hub) -> Repository:
    return hub.repositories[NAME]


def weights(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.suffix == ".safetensors"}


async def test_a_model_is_fetched_whole_and_never_code_or_pickles(pod: Pods, model: Path) -> None:
    child = await pod.start()
    found = await child.found()
    assert {path.name for path in found.path.iterdir()} == WEIGHTS | SMALL
    for path in found.path.iterdir():
        assert path.read_bytes() == (model / path.name).read_bytes()
    facts = found.facts
    assert (facts.revision, facts.architecture, facts.layers) == (repository(pod.hub).branches["main"], "qwen2", 4)
    assert facts.bytes == sum((model / name).stat().st_size for name in WEIGHTS)
    total = sum((model / name).stat().st_size for name in WEIGHTS | SMALL)
    percents = child.percents()
    assert percents[-1] == (99, total)
    assert percents == sorted(percents)
    assert child.troubles() == []


async def test_the_hubs_own_tools_read_the_cache(pod: Pods) -> None:
    found = await (await pod.start()).found()
    scanned = scan_cache_dir(pod.cache)
    assert not scanned.warnings
    (repo,) = scanned.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, set(revision.refs)) == (NAME, found.facts.revision, {"main"})
    assert revision.snapshot_path == found.path
    assert len(revision.files) == len(WEIGHTS | SMALL)


async def test_the_hubs_own_tools_and_a_download_keep_out_of_each_others_way(pod: Pods, model: Path) -> None:
    etag = repository(pod.hub).commits[repository(pod.hub).branches["main"]]["model-embed.safetensors"].etag
    lock = pod.cache / f".locks/models--org--tiny/{etag}.lock"
    lock.parent.mkdir(parents=True)
    with WeakFileLock(lock):
        child = await pod.start()
        await child.until(lambda: bool(pod.hub.requests("model-odd")), "the last file that nobody holds")
        assert pod.hub.requests("model-embed") == []
    found = await child.found()
    assert len(pod.hub.requests("model-embed")) == 2, "the file, and the storage that it leads to"
    path = await asyncio.to_thread(
        hf_hub_download, NAME, "model-embed.safetensors", cache_dir=pod.cache, endpoint=pod.hub.url, token=False
    )
    assert path == str(found.path / "model-embed.safetensors")
    assert len(pod.hub.requests("model-embed")) == 2, "it is taken from the cache"


@pytest.mark.parametrize(
    ("rank", "size", "tied", "expected"),
    [
        (1, 2, False, {"layer-0", "layer-1", "embed", "odd"}),
        (0, 2, False, {"layer-2", "layer-3", "last", "odd"}),
        (0, 2, True, {"layer-2", "layer-3", "last", "embed", "odd"}),
        (1, 3, False, {"layer-2", "odd"}),
    ],
)
async def test_a_rank_of_a_pipeline_fetches_the_files_of_its_layers_only(
    tmp_path: Path, rank: int, size: int, tied: bool, expected: set[str]
) -> None:
    hub, _ = hub_of(write_repository(tmp_path / "model", tied=tied))
    async with serving(hub), pods(hub, tmp_path) as started:
        found = await (await started.start(rank=rank, world_size=size)).found()
    assert weights(found.path) == {f"model-{part}.safetensors" for part in expected}


async def test_all_ranks_of_a_tensor_group_fetch_everything(pod: Pods) -> None:
    found = await (await pod.start(rank=1, world_size=2, sharding=Sharding.TENSOR)).found()
    assert weights(found.path) == WEIGHTS


async def test_ranks_with_different_files_report_the_same_digest_and_size(pod: Pods, tmp_path: Path) -> None:
    facts = []
    for rank in (0, 1):
        cache = tmp_path / f"cache-{rank}"
        cache.mkdir()
        facts.append((await (await pod.start(rank=rank, world_size=2, cache_dir=cache)).found()).facts)
    assert facts[0] == facts[1]
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 4, "x": 1}))
    repository(pod.hub).push(tmp_path / "model")
    assert (await (await pod.start()).found()).facts.digest != facts[0].digest


async def test_what_is_there_is_not_fetched_again_and_a_known_commit_needs_no_hub(pod: Pods) -> None:
    found = await (await pod.start()).found()
    sent = len(pod.hub.served)
    again = await (await pod.start()).found()
    assert again == found
    assert [request.path for request in pod.hub.served[sent:]] == [f"/api/models/{NAME}/revision/main"]
    pod.hub.faults.append(Fault(kind=Kind.STATUS, status=500))
    assert await (await pod.start(revision=found.facts.revision)).found() == found


async def test_a_list_that_somebody_else_left_in_a_shared_cache_leads_nowhere(pod: Pods) -> None:
    found = await (await pod.start()).found()
    (path,) = (pod.cache / ".locks/models--org--tiny").glob(f"*{found.facts.revision}.json")
    known = json.loads(path.read_text())
    known["files"].append({"name": "../../../../escaped.json", "size": 2, "etag": "0" * 64})
    path.write_text(json.dumps(known))
    assert await (await pod.start(revision=found.facts.revision)).found() == found
    assert json.loads(path.read_text())["files"] == known["files"][:-1], "it was asked for again"


async def test_a_pinned_commit_stays_when_the_branch_moves(pod: Pods, tmp_path: Path) -> None:
    first = repository(pod.hub).branches["main"]
    second = repository(pod.hub).push(write_repository(tmp_path / "newer", salt=100))
    assert first != second
    assert (await (await pod.start(revision=first)).found()).facts.revision == first
    assert (await (await pod.start()).found()).facts.revision == second


async def test_a_tag_or_branch_after_the_at_sign_is_resolved(pod: Pods, tmp_path: Path) -> None:
    commit = repository(pod.hub).push(write_repository(tmp_path / "tagged", salt=3), branch="v1.0")
    found = await (await pod.start(source=f"{SOURCE}@v1.0")).found()
    assert found.facts.revision == commit


@pytest.mark.parametrize("order", [("v1", "v1/x", "v1/x/y"), ("v1/x/y", "v1/x", "v1")], ids=["inwards", "outwards"])
async def test_a_branch_whose_name_is_the_folder_of_another_is_fetched_too(
    pod: Pods, model: Path, order: tuple[str, ...]
) -> None:
    """Not at once on a hub, but one after the other on a cache that stays."""
    for name in order:
        commit = repository(pod.hub).push(model, branch=name)
        assert (await (await pod.start(source=f"{SOURCE}@{name}")).found()).facts.revision == commit
    assert (pod.cache / "models--org--tiny/refs" / order[0]).read_text() == commit
    assert not list((pod.cache / "models--org--tiny").rglob("*.new"))


async def test_a_mirror_that_lists_names_only_is_asked_for_each_file(pod: Pods) -> None:
    whole = await (await pod.start()).found()
    pod.hub.metadata = False
    other = pod.home / "other"
    other.mkdir()
    found = await (await pod.start(cache_dir=other)).found()
    assert found.facts == whole.facts
    assert pod.hub.requests("model-odd.safetensors", "HEAD")


async def test_a_token_is_sent_to_the_hub_and_never_to_the_storage_behind_it(pod: Pods) -> None:
    repository(pod.hub).token = "hf_secret"
    await (await pod.start(environment={"HF_TOKEN": "hf_secret\n"})).found()
    to_hub = [request for request in pod.hub.served if not request.path.startswith("/cdn")]
    to_storage = [request for request in pod.hub.served if request.path.startswith("/cdn")]
    assert {request.authorization for request in to_hub} == {"Bearer hf_secret"}
    assert {request.authorization for request in to_storage} == {None}
    assert to_storage


async def test_a_proxy_of_the_environment_is_used(pod: Pods) -> None:
    pod.hub.cdn = "http://storage.invalid"
    found = await (
        await pod.start(environment={"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": pod.hub.url})
    ).found()
    assert weights(found.path) == WEIGHTS
    assert {request.host for request in pod.hub.served} == {"hub.invalid", "storage.invalid"}


async def test_a_download_that_was_killed_goes_on_where_it_was(pod: Pods, model: Path) -> None:
    pod.hub.bytes_per_second = 100_000
    name = "model-embed.safetensors"
    size = (model / name).stat().st_size
    killed = await pod.start()
    await killed.until(lambda: pod.hub.sent(f"/cdn-lfs/{NAME}") > 0, "the first bytes of the weights")
    await killed.until(lambda: pod.hub.sent("model-embed") > size // 3, "a part of the first file")
    await killed.kill()
    (partial,) = (pod.cache / "models--org--tiny/blobs").glob("*.incomplete")
    there = partial.stat().st_size
    assert 0 < there < size
    pod.hub.bytes_per_second = None
    await (await pod.start()).found()
    first, second = [request for request in pod.hub.requests("/cdn-lfs") if name in request.path]
    assert (first.start, second.start) == (0, there)
    assert second.sent == size - there
