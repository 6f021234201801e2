"""Everything that can go wrong with a hub: what passes is waited for, what lasts is told with its remedy."""

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_runner.download import result
from tests.hub import Fault, Hub, Kind, Repository, serving
from tests.runner.downloads import NAME, SOURCE, Pods, hub_of, pods, write_repository
from tests.runner.supervisors import PATIENCE

FILE = "model-embed.safetensors"
LARGE = f"/cdn-lfs/.*/{FILE}"


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


# -- what passes
@pytest.mark.parametrize(
    ("fault", "trouble"),
    [
        (Fault(kind=Kind.STATUS, status=503, path="/api/models", times=2), "org/tiny: HTTP 503"),
        (Fault(kind=Kind.STATUS, status=500, path="/resolve/.*config.json", times=2), "config.json: HTTP 500"),
        (Fault(kind=Kind.STATUS, status=502, path=LARGE, times=2), f"{FILE}: HTTP 502"),
        (Fault(kind=Kind.STATUS, status=429, path=LARGE, times=1), f"{FILE}: HTTP 429"),
        (Fault(kind=Kind.STATUS, status=403, path=LARGE, times=1), f"{FILE}: HTTP 403 from localhost"),
        (Fault(kind=Kind.STALL, path=LARGE, after=20_000, times=1), f"{FILE}: no byte in time"),
        (Fault(kind=Kind.STALL, path="chat_template", after=0, times=1), "chat_template.jinja: no byte in time"),
        (Fault(kind=Kind.RESET, path="/resolve/.*config.json", after=0, times=1), "config.json: "),
    ],
    ids=lambda value: f"{value.kind}-{value.status}-{value.path[:10]}" if isinstance(value, Fault) else "",
)
async def test_what_may_pass_is_tried_again_with_a_line_each(pod: Pods, fault: Fault, trouble: str) -> None:
    times = fault.times
    pod.hub.faults.append(fault)
    child = await pod.start()
    await child.found()
    assert len(child.troubles()) == times
    assert all(line.startswith(trouble) for line in child.troubles()), child.troubles()


async def test_after_a_reset_only_what_is_missing_is_fetched(pod: Pods, model: Path) -> None:
    pod.hub.faults.append(Fault(kind=Kind.RESET, path=LARGE, after=20_000, times=2))
    child = await pod.start()
    found = await child.found()
    assert len(child.troubles()) == 2
    requests = [request for request in pod.hub.requests("/cdn-lfs") if FILE in request.path]
    starts = [request.start for request in requests]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] < starts[2]
    assert requests[2].sent == (model / FILE).stat().st_size - starts[2]
    assert (found.path / FILE).read_bytes() == (model / FILE).read_bytes()


async def test_a_hub_that_asks_for_time_gets_it(pod: Pods) -> None:
    pod.hub.faults.append(Fault(kind=Kind.STATUS, status=429, path=LARGE, times=1, retry_after="2"))
    child = await pod.start()
    await child.found()
    (trouble,) = [line for line in child.lines if isinstance(line, result.Trouble)]
    assert trouble.seconds == 2.0
    first, second = [request for request in pod.hub.requests("/cdn-lfs") if FILE in request.path]
    assert second.begun - first.ended >= 2.0


async def test_a_server_without_ranges_sends_the_whole_again(pod: Pods, model: Path) -> None:
    pod.hub.faults += [
        Fault(kind=Kind.RESET, path=LARGE, after=20_000, times=1),
        Fault(kind=Kind.NO_RANGES, path=LARGE),
    ]
    found = await (await pod.start()).found()
    assert (found.path / FILE).read_bytes() == (model / FILE).read_bytes()


async def test_a_hub_that_cannot_be_reached_or_found_is_waited_for(pod: Pods) -> None:
    for url in ("http://127.0.0.1:9", "http://hub.invalid:80"):
        child = await pod.start(environment={"HF_ENDPOINT": url})
        await child.until(lambda child=child: len(child.troubles()) >= 2, "two tries")  # type: ignore[misc]
        seconds = [line.seconds for line in child.lines if isinstance(line, result.Trouble)]
        assert seconds[:2] == [0.5, 1.0]
        await child.kill()


# -- what came wrong
async def test_a_file_that_comes_damaged_once_is_fetched_once_more(pod: Pods, model: Path) -> None:
    pod.hub.faults.append(Fault(kind=Kind.CORRUPT, path=LARGE, times=1))
    child = await pod.start()
    found = await child.found()
    (trouble,) = child.troubles()
    assert re.fullmatch(rf"{FILE} came with sha256 [0-9a-f]+…, the hub says [0-9a-f]+…: removed", trouble)
    assert (found.path / FILE).read_bytes() == (model / FILE).read_bytes()


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (Fault(kind=Kind.CORRUPT, path=LARGE), f"{FILE} came twice with sha256 "),
        (Fault(kind=Kind.TRUNCATED, path=LARGE, cut=100), f"{FILE} came twice with "),
        (Fault(kind=Kind.CORRUPT, path="/resolve/.*/chat_template"), "chat_template.jinja came twice with git blob "),
    ],
    ids=["corrupt", "truncated", "small"],
)
async def test_a_file_that_comes_wrong_twice_is_corrupt_and_leaves_nothing(pod: Pods, fault: Fault, word: str) -> None:
    pod.hub.faults.append(fault)
    child = await pod.start()
    message = await child.refused(Reason.MODEL_CORRUPT)
    assert message.startswith(f"{SOURCE}@main: {word}")
    assert not list((pod.cache / "models--org--tiny/blobs").glob("*.incomplete"))
    pod.hub.faults.clear()
    await (await pod.start()).found()


async def test_a_file_that_was_damaged_in_the_cache_is_replaced(pod: Pods, model: Path) -> None:
    found = await (await pod.start()).found()
    blob = (found.path / FILE).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    child = await pod.start()
    await child.found()
    assert child.troubles()[0].startswith(f"{FILE} in the cache has sha256 ")
    assert (found.path / FILE).read_bytes() == (model / FILE).read_bytes()


async def test_an_index_that_names_a_file_that_is_not_there_is_corrupt(tmp_path: Path) -> None:
    directory = write_repository(tmp_path / "model")
    (directory / FILE).unlink()
    hub, _ = hub_of(directory)
    async with serving(hub), pods(hub, tmp_path) as started:
        message = await (await started.start()).refused(Reason.MODEL_CORRUPT)
    assert message == f"{SOURCE}@main: model.safetensors.index.json names files that the repository has not: {FILE}"


# -- what lasts
async def test_a_repository_that_is_gated_is_told_with_what_to_do(pod: Pods) -> None:
    repository(pod.hub).gated = True
    message = await (await pod.start()).refused(Reason.MODEL_UNAUTHORIZED)
    assert "org/tiny is gated (HTTP 401" in message
    assert "no token was given: put one into a Secret under the key token" in message
    message = await (await pod.start(environment={"HF_TOKEN": "hf_mine"})).refused(Reason.MODEL_UNAUTHORIZED)
    assert "org/tiny is gated (HTTP 403" in message
    assert "accept the conditions on the repository's page" in message
    assert "hf_mine" not in message


async def test_a_wrong_token_is_told_apart_from_none(pod: Pods) -> None:
    repository(pod.hub).token = "hf_right"
    message = await (await pod.start()).refused(Reason.MODEL_UNAUTHORIZED)
    assert "is private, gated, or does not exist" in message
    assert "spec.model.credentialsSecretRef" in message
    message = await (await pod.start(environment={"HF_TOKEN": "hf_wrong"})).refused(Reason.MODEL_UNAUTHORIZED)
    assert "the token of spec.model.credentialsSecretRef was refused" in message
    message = await (await pod.start(environment={"HF_TOKEN": "two\nlines"})).refused(Reason.MODEL_UNAUTHORIZED)
    assert "characters that no token has" in message


async def test_the_password_of_a_mirror_is_used_and_never_told(pod: Pods, capfd: pytest.CaptureFixture[str]) -> None:
    endpoint = {"HF_ENDPOINT": pod.hub.url.replace("://", "://robot:s3cret@")}
    pod.hub.metadata = False
    pod.hub.faults.append(Fault(kind=Kind.STATUS, status=503, path="/resolve/.*config.json", times=2))
    await (await pod.start(environment=endpoint)).found()
    to_hub = [request for request in pod.hub.served if not request.path.startswith("/cdn")]
    to_storage = [request for request in pod.hub.served if request.path.startswith("/cdn")]
    assert {request.authorization for request in to_hub} == {"Basic cm9ib3Q6czNjcmV0"}
    assert {request.authorization for request in to_storage} == {None}
    message = await (await pod.start(source=f"{SOURCE}@nope", environment=endpoint)).refused(Reason.MODEL_NOT_FOUND)
    assert message.startswith(f"{SOURCE}@nope: {pod.hub.url} has no revision")
    for wrong in ("ftp://robot:s3cret@x", "http://robot:s3cret#/@x", "http://robot:s3cret/@x", "http://robot:s3cret@"):
        message = await (await pod.start(environment={"HF_ENDPOINT": wrong})).refused(Reason.MODEL_UNREACHABLE)
        assert "HF_ENDPOINT" in message
        assert "s3cret" not in message
    assert "s3cret" not in "".join(capfd.readouterr())


async def test_what_does_not_exist_is_named(pod: Pods) -> None:
    token = {"HF_TOKEN": "hf_mine"}
    message = await (await pod.start(source="hf://org/none", environment=token)).refused(Reason.MODEL_NOT_FOUND)
    assert message.startswith(f"hf://org/none@main: {pod.hub.url} answers HTTP 404 for org/none")
    message = await (await pod.start(source=f"{SOURCE}@v9")).refused(Reason.MODEL_NOT_FOUND)
    assert "has no revision 'v9' of org/tiny: correct the part after @ in spec.model.source" in message
    pod.hub.faults.append(Fault(kind=Kind.STATUS, status=404, error_code="EntryNotFound", path="/resolve/.*/config"))
    message = await (await pod.start()).refused(Reason.MODEL_NOT_FOUND)
    assert message == f"{SOURCE}@main: {pod.hub.url} has no file config.json"


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        ("config.json", "has no config.json in its top folder"),
        ("tokenizer.json", "has no tokenizer (one of tokenizer.json, "),
        ("*.safetensors", "has no model*.safetensors in its top folder"),
    ],
)
async def test_a_repository_without_a_model_is_told_before_anything_is_fetched(
    tmp_path: Path, gone: str, word: str
) -> None:
    directory = write_repository(tmp_path / "model")
    for path in directory.glob(gone):
        path.unlink()
    hub, _ = hub_of(directory)
    async with serving(hub), pods(hub, tmp_path) as started:
        message = await (await started.start()).refused(Reason.MODEL_NOT_FOUND)
    assert word in message
    assert hub.sent("/cdn-lfs") == 0


async def test_what_is_no_hub_is_told(pod: Pods) -> None:
    pod.hub.faults.append(Fault(kind=Kind.NO_JSON))
    message = await (await pod.start()).refused(Reason.MODEL_UNREACHABLE)
    assert message.endswith("is HF_ENDPOINT right?")
    message = await (await pod.start(environment={"HF_ENDPOINT": "ftp://x"})).refused(Reason.MODEL_UNREACHABLE)
    assert message.endswith("is HF_ENDPOINT right?")


async def test_too_many_ranks_are_told_before_the_weights_are_fetched(pod: Pods) -> None:
    message = await (await pod.start(rank=4, world_size=5)).refused(Reason.MODEL_UNSUPPORTED)
    assert "4 layers, too few for a pipeline of 5 ranks" in message
    assert pod.hub.requests("model-embed") == []


# -- space and file systems
async def test_a_cache_that_is_too_small_is_told_with_the_numbers_before_anything_is_fetched(pod: Pods) -> None:
    message = await (await pod.start(cache_bytes=100_000)).refused(Reason.NO_SPACE)
    assert re.search(r"needs [\d.]+ kB more for rank 0, spec.cache.sizeLimit leaves [\d.]+ kB of 100.0 kB$", message), (
        message
    )
    assert pod.hub.requests("model-embed") == []


async def test_a_full_file_system_is_told_before_anything_is_fetched(pod: Pods) -> None:
    message = await (await pod.start(cache_size=200_000)).refused(Reason.NO_SPACE)
    assert re.search(rf"needs [\d.]+ kB more for rank 0, the cache {pod.cache} has [\d.]+ kB free$", message), message
    assert pod.hub.requests("model-embed") == []


async def test_a_file_system_that_fills_up_meanwhile_is_told(pod: Pods) -> None:
    pod.hub.faults.append(Fault(kind=Kind.STALL, path=LARGE, after=20_000, times=1))
    child = await pod.start(cache_size=600_000, environment={"HF_HUB_DOWNLOAD_TIMEOUT": "5"})
    await child.until(lambda: pod.hub.sent(FILE) == 20_000, "the stall")
    fill(Path(f"{child.root}{pod.cache}/other"))
    message = await child.refused(Reason.NO_SPACE)
    assert message.startswith(f"{pod.cache} is full: model-")
    assert message.endswith("more (No space left on device)")


@pytest.mark.parametrize("inodes", [12, 14, 16, 18])
async def test_a_file_system_without_room_for_another_file_is_told(pod: Pods, inodes: int) -> None:
    message = await (await pod.start(cache_size=f"10m,nr_inodes={inodes}")).refused(Reason.NO_SPACE)
    assert message.startswith(f"{pod.cache} is full: ")
    assert message.endswith("(No space left on device)")


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_cache_that_cannot_be_written_is_told(pod: Pods) -> None:
    (pod.cache / "models--org--tiny").write_text("in the way")
    message = await (await pod.start()).refused(Reason.MODEL_UNREACHABLE)
    assert message.startswith(f"the cache cannot be used by user {os.getuid()}: ")


# -- two on one cache
async def test_two_ranks_on_one_cache_never_fetch_the_same_file(pod: Pods) -> None:
    pod.hub.bytes_per_second = 200_000
    children = [await pod.start(), await pod.start()]
    founds = [await child.found() for child in children]
    assert founds[0] == founds[1]
    sizes = {name: (founds[0].path / name).stat().st_size for name in repository(pod.hub).files() if "model-" in name}
    for name, size in sizes.items():
        (request,) = [r for r in pod.hub.requests("/cdn-lfs") if name in r.path]
        assert request.sent == size


async def test_the_lock_of_a_rank_that_dies_goes_to_the_next_which_continues(pod: Pods, model: Path) -> None:
    pod.hub.faults.append(Fault(kind=Kind.STALL, path=LARGE, after=20_000, times=1))
    patient = {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}
    first = await pod.start(environment=patient)
    await first.until(lambda: pod.hub.sent(FILE) == 20_000, "the bytes before the stall")
    second = await pod.start()
    await second.until(lambda: bool(pod.hub.sent("model-odd")), "the files that nobody holds")
    assert len(pod.hub.requests(f"/cdn-lfs/{NAME}")) > 1
    assert sum(FILE in r.path for r in pod.hub.requests("/cdn-lfs")) == 1, "it waits for what the first one holds"
    await first.kill()
    await second.found()
    assert sum(r.sent for r in pod.hub.requests("/cdn-lfs") if FILE in r.path) == (model / FILE).stat().st_size


async def test_a_child_whose_supervisor_is_gone_ends_itself(pod: Pods) -> None:
    pod.hub.faults.append(Fault(kind=Kind.STATUS, status=503))
    read, write = os.pipe()
    child = await pod.start_into(write)
    os.close(write)
    os.close(read)
    async with asyncio.timeout(PATIENCE):
        assert await child.wait() == 1


async def test_a_kind_of_model_that_cannot_be_written_down_is_not_told(pod: Pods, model: Path) -> None:
    config = {"model_type": "\ud800", "num_hidden_layers": 4}
    (model / "config.json").write_text(json.dumps(config))
    repository(pod.hub).push(model)
    assert (await (await pod.start()).found()).facts.architecture is None


async def test_a_name_that_cannot_be_written_down_is_told_escaped(pod: Pods, model: Path) -> None:
    index = {"weight_map": {"model.embed_tokens.weight": "model-\ud800.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    repository(pod.hub).push(model)
    message = await (await pod.start()).refused(Reason.MODEL_CORRUPT)
    assert message.endswith("names files that the repository has not: model-\\ud800.safetensors")
