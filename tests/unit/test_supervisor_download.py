"""Verification of a model's files: what is missing or damaged is named with its numbers."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import ModelFacts
from mlx_runner.download import places, result, safetensors, verify
from mlx_runner.download.report import Progress
from mlx_runner.download.request import Request

Tensors = dict[str, tuple[int, int]]


def write_weights(path: Path, tensors: Tensors, *, data: int | None = None) -> None:
    header = json.dumps(
        {
            "__metadata__": {"format": "mlx"},
            **{name: {"dtype": "U8", "shape": [1], "data_offsets": list(span)} for name, span in tensors.items()},
        }
    ).encode()
    size = max((end for _, end in tensors.values()), default=0) if data is None else data
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards with an index."""
    directory = tmp_path / "model"
    directory.mkdir()
    write_weights(directory / "model-1.safetensors", {"a": (0, 4), "b": (4, 10)})
    write_weights(directory / "model-2.safetensors", {"c": (0, 6)})
    weight_map = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 4}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def check(model: Path, **fields: Any) -> tuple[ModelFacts, list[result.Said]]:
    told: list[result.Said] = []
    nowhere = model.parent / "nowhere"
    request = Request(
        source="pvc://models", model_dir=model, cache_dir=nowhere, memory=model.parent / "hashes.json", **fields
    )
    return verify.verify(model, "claim models", request, Progress(told.append)), told


def refused(model: Path) -> tuple[Reason, str]:
    with pytest.raises(result.ModelError) as caught:
        check(model)
    return caught.value.reason, caught.value.message


def test_a_whole_model_gives_its_facts(model: Path) -> None:
    facts, _ = check(model)
    sizes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert (facts.architecture, facts.layers, facts.bytes) == ("qwen2", 4, sizes)
    assert facts.digest == check(model)[0].digest
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 5}))
    assert facts.digest != check(model)[0].digest


def test_a_single_file_needs_no_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    (model / "model-2.safetensors").unlink()
    assert check(model)[0].bytes == (model / "model-1.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("gone", "reason", "word"),
    [
        ("config.json", Reason.MODEL_NOT_FOUND, "no config.json in"),
        ("tokenizer.json", Reason.MODEL_NOT_FOUND, "no tokenizer in"),
        (
            "model-2.safetensors",
            Reason.MODEL_CORRUPT,
            "lacks 1 of the 2 files of model.safetensors.index.json: model-2",
        ),
    ],
)
def test_a_missing_file_is_named(model: Path, gone: str, reason: Reason, word: str) -> None:
    (model / gone).unlink()
    assert refused(model)[0] is reason
    assert word in refused(model)[1]


def test_a_missing_directory_is_named_with_its_claim(tmp_path: Path) -> None:
    assert refused(tmp_path / "no") == (Reason.MODEL_NOT_FOUND, f"{tmp_path}/no (claim models) does not exist")
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file") == (Reason.MODEL_NOT_FOUND, f"{tmp_path}/file (claim models) is no directory")


def test_a_directory_without_weights_is_no_model(model: Path) -> None:
    for path in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        path.unlink()
    assert refused(model) == (Reason.MODEL_NOT_FOUND, f"no model*.safetensors in {model} (claim models)")


def test_a_truncated_file_is_named_with_the_numbers(model: Path) -> None:
    path = model / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    reason, message = refused(model)
    assert reason is Reason.MODEL_CORRUPT
    assert message == f"{path} is damaged: tensor 'b' ends at 10 but the file holds 7 bytes of data"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "0 bytes are too few"),
        (b"12345678901234", "its header claims"),
        (struct.pack("<Q", 4) + b"nope", "its header is no JSON"),
        (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
        (struct.pack("<Q", 7) + b'{"a":1}', "tensor 'a' has no data_offsets"),
        (struct.pack("<Q", 2) + b"{}xx", "its tensors end at 0 but the file holds 2 bytes"),
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(safetensors.DamagedError, match=word.replace("[", r"\[")):
        safetensors.tensors(tmp_path / "x")


def test_gaps_and_overlaps_between_tensors_are_damage(tmp_path: Path) -> None:
    for spans in ({"a": (0, 4), "b": (5, 8)}, {"a": (0, 4), "b": (3, 8)}):
        write_weights(tmp_path / "x", spans)
        with pytest.raises(safetensors.DamagedError, match="tensor 'b' lies at"):
            safetensors.tensors(tmp_path / "x")


def test_a_tensor_that_the_index_promises_must_be_in_its_file(model: Path) -> None:
    write_weights(model / "model-2.safetensors", {"other": (0, 6)})
    reason, message = refused(model)
    assert reason is Reason.MODEL_CORRUPT
    assert "lacks 1 tensors that model.safetensors.index.json places there, such as 'c'" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_broken_json_is_corrupt(model: Path, name: str, content: str) -> None:
    (model / name).write_bytes(content.encode("latin-1"))
    reason, message = refused(model)
    assert (reason, str(model / name) in message) == (Reason.MODEL_CORRUPT, True)


def test_a_manifest_is_checked_and_hashes_are_remembered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model / "model-2.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (model / "SHA256SUMS").write_text(f"{digest}  model-2.safetensors\n")
    check(model)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        patch.setattr("mlx_runner.download.hashes._BLOCK", None)  # reading it again would fail
        check(model)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reason, message = refused(model)
    assert reason is Reason.MODEL_CORRUPT
    assert message.startswith(f"{path} has sha256 ")
    path.unlink()
    assert refused(model)[0] is Reason.MODEL_CORRUPT


def test_a_rank_hashes_the_weights_that_it_reads_and_leaves_the_others_to_theirs(model: Path) -> None:
    write_weights(model / "model-1.safetensors", {"model.layers.0.a": (0, 4), "model.layers.1.b": (4, 10)})
    write_weights(model / "model-2.safetensors", {"model.layers.2.c": (0, 3), "model.layers.3.c": (3, 6)})
    where = {"model.layers.0.a": 1, "model.layers.1.b": 1, "model.layers.2.c": 2, "model.layers.3.c": 2}
    weight_map = {tensor: f"model-{number}.safetensors" for tensor, number in where.items()}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.glob("model-*.safetensors")}
    (model / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    facts = [check(model, rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert facts[0] == facts[1]
    data = bytearray((model / "model-2.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model-2.safetensors").write_bytes(data)
    assert check(model, rank=1, world_size=2)[0] == facts[1]
    with pytest.raises(result.ModelError, match="has sha256"):
        check(model, rank=0, world_size=2)


def test_the_progress_of_hashing_is_told_with_its_bytes(model: Path) -> None:
    path = model / "model-2.safetensors"
    (model / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    _, told = check(model)
    size = path.stat().st_size
    assert told == [result.Percent(percent=0, total=size), result.Percent(percent=99, total=size)]


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "{outside}"])
@pytest.mark.parametrize("listing", ["model.safetensors.index.json", "SHA256SUMS"])
def test_a_list_that_names_a_file_outside_of_the_model_is_refused(model: Path, listing: str, name: str) -> None:
    outside = model.parent / "secret"
    write_weights(outside, {"a": (0, 4)})
    name = name.format(outside=outside)
    if listing == "SHA256SUMS":
        digest = hashlib.sha256(outside.read_bytes()).hexdigest()
        (model / listing).write_text(f"{digest}  {name}\n")
    else:
        (model / listing).write_text(json.dumps({"weight_map": {"a": name}}))
    assert refused(model) == (Reason.MODEL_CORRUPT, f"{model / listing} names {name!r}, which is not inside {model}")


def test_links_that_lead_nowhere_or_in_circles_are_told_and_never_crash(model: Path) -> None:
    target = model / "model-1.safetensors"
    target.unlink()
    target.symlink_to(model / "nowhere")
    assert refused(model)[0] is Reason.MODEL_CORRUPT
    target.unlink()
    target.symlink_to(target)
    assert refused(model)[0] in {Reason.MODEL_CORRUPT, Reason.MODEL_UNREACHABLE}


def test_sources_lead_to_their_directories() -> None:
    mount = Path("/m")
    assert places.directory(places.parsed("pvc://claim/a/b"), mount) == Path("/m/a/b")
    assert places.directory(places.parsed("pvc://claim"), mount) == mount
    assert places.directory(places.parsed("oci://registry/model:1"), mount) == mount
    for source in ("s3://bucket", "pvc://claim/../etc"):
        with pytest.raises(result.ModelError, match=source) as caught:
            places.parsed(source)
        assert caught.value.reason is Reason.SOURCE_UNSUPPORTED
