"""Adapters on a claim or in an image: whole, of a kind that can be fused, and what their manifest says."""

import hashlib
import json
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_runner.download import adapter, result
from mlx_runner.download.report import Progress
from mlx_runner.download.request import Request
from mlx_runner.download.work import work
from tests.runner.downloads import write_adapter
from tests.runner.supervisors import write_model


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A claim with a model and an adapter."""
    write_model(tmp_path / "model")
    write_adapter(tmp_path / "adapter")
    return tmp_path


def done(volume: Path, **fields: str) -> tuple[result.Found, list[result.Said]]:
    asked = {"source": "pvc://models/model", "adapter": "pvc://models/adapter", **fields}
    places = {"model_dir": volume, "adapter_dir": volume, "cache_dir": volume / "no", "memory": volume / "hashes.json"}
    told: list[result.Said] = []
    return work(Request.model_validate(asked | places), told.append), told


def refused(volume: Path, **fields: str) -> tuple[Reason, str]:
    with pytest.raises(result.ModelError) as caught:
        done(volume, **fields)
    return caught.value.reason, caught.value.message


def sums(directory: Path, *names: str) -> None:
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
    (directory / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_adapter_beside_the_model_is_found_and_belongs_to_the_digest(volume: Path) -> None:
    found, _ = done(volume)
    assert (found.path, found.adapter) == (volume / "model", volume / "adapter")
    plain = work(
        Request(source="pvc://m/model", model_dir=volume, cache_dir=volume / "no", memory=volume / "h"), lambda _: None
    )
    assert plain.adapter is None
    assert found.facts.digest != plain.facts.digest
    assert found == done(volume)[0]
    config = json.loads((volume / "adapter/adapter_config.json").read_text())
    (volume / "adapter/adapter_config.json").write_text(json.dumps({**config, "num_layers": 3}))
    assert done(volume)[0].facts.digest != found.facts.digest


def test_what_the_manifest_of_an_adapter_says_must_hold_and_its_bytes_are_progress(volume: Path) -> None:
    directory = volume / "adapter"
    unverified = done(volume)[0].facts.digest
    sums(directory, "adapter_config.json", "adapters.safetensors")
    found, told = done(volume)
    assert found.facts.digest != unverified, "two adapters of one size are told apart once their hashes are known"
    total = sum((directory / name).stat().st_size for name in adapter.FILES)
    assert told[-1] == result.Percent(percent=99, total=total)
    flip(directory / "adapters.safetensors")
    reason, message = refused(volume)
    assert reason is Reason.MODEL_CORRUPT
    assert message.startswith(f"spec.model.adapter: {directory / 'adapters.safetensors'} has sha256 ")
    assert message.endswith("…") and ", SHA256SUMS says " in message


def test_a_file_that_the_manifest_lists_must_be_there(volume: Path) -> None:
    directory = volume / "adapter"
    sums(directory, "0000100_adapters.safetensors")
    (directory / "0000100_adapters.safetensors").unlink()
    assert refused(volume) == (
        Reason.MODEL_CORRUPT,
        f"spec.model.adapter: {directory / '0000100_adapters.safetensors'} is missing, SHA256SUMS lists it",
    )


def test_percents_are_of_model_and_adapter_together_and_never_fall(volume: Path) -> None:
    sums(volume / "adapter", "adapters.safetensors")
    sums(volume / "model", "model.safetensors", "config.json")
    _, told = done(volume)
    percents = [(line.percent, line.total) for line in told if isinstance(line, result.Percent)]
    assert percents == sorted(percents)
    total = (volume / "adapter/adapters.safetensors").stat().st_size
    total += sum((volume / "model" / name).stat().st_size for name in ("model.safetensors", "config.json"))
    assert {of for _, of in percents if of} == {total}


def test_an_adapter_that_is_not_there_is_told_before_the_model_is_looked_at(volume: Path) -> None:
    (volume / "model/config.json").unlink()
    assert refused(volume, adapter="pvc://models/none") == (
        Reason.MODEL_NOT_FOUND,
        f"spec.model.adapter: {volume}/none (claim models) does not exist",
    )
    assert refused(volume, adapter="pvc://models/model")[1] == (
        f"spec.model.adapter: the adapter in {volume}/model has no adapter_config.json"
    )
    assert refused(volume)[1].startswith("no config.json in "), "what is wrong with the model names no adapter"


def test_a_source_that_this_runner_does_not_know_names_the_field(volume: Path) -> None:
    reason, message = refused(volume, adapter="s3://bucket/adapter")
    assert reason is Reason.SOURCE_UNSUPPORTED
    assert message.startswith("spec.model.adapter: unsupported model source 's3://bucket/adapter'")


@pytest.mark.parametrize(
    ("config", "reason", "words"),
    [
        ("{", Reason.MODEL_CORRUPT, "is damaged: "),
        ("[]", Reason.MODEL_CORRUPT, "holds no JSON object"),
        ('{"fine_tune_type": "full"}', Reason.MODEL_UNSUPPORTED, "fine_tune_type 'full'; supported: lora, dora"),
        ('{"num_layers": 2}', Reason.MODEL_CORRUPT, "lacks some of num_layers and lora_parameters"),
        ('{"num_layers": 2, "lora_parameters": {"rank": "4"}}', Reason.MODEL_CORRUPT, "with rank, scale, dropout"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_told(volume: Path, config: str, reason: Reason, words: str) -> None:
    (volume / "adapter/adapter_config.json").write_text(config)
    found, message = refused(volume)
    assert found is reason
    assert message.startswith("spec.model.adapter: ") and words in message


def test_parts_that_need_something_are_waited_for() -> None:
    told: list[result.Said] = []
    progress = Progress(told.append, parts=2)
    progress.need({"a": 10})
    progress.at("a", 10)
    assert told == [result.Percent(percent=0)]
    progress.need({"b": 10})
    assert told[1:] == [result.Percent(percent=50, total=20)]
