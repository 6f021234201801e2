"""Is a directory a whole model? Every file that loading needs is there, and is what it claims to be."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import ModelFacts

from . import safetensors
from .hashes import MANIFEST, Hashes, manifest
from .result import ModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
"""At least one of them; which one depends on the tokenizer's kind."""
_LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")


def verify(directory: Path, place: str, memory: Path, tell: Callable[[int], None]) -> ModelFacts:
    """Check the model in `directory` (of `place`, for messages); `tell` hears percents.

    Raises:
        ModelError: with the reason, the file and the numbers.
    """
    try:
        return _verify(directory, place, memory, tell)
    except OSError as error:
        # A volume that answers with errors, or files that this user may not read.
        raise ModelError(Reason.MODEL_UNREACHABLE, f"cannot read {error.filename or directory}: {error}") from error


def _verify(directory: Path, place: str, memory: Path, tell: Callable[[int], None]) -> ModelFacts:
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "does not exist"
        raise ModelError(Reason.MODEL_NOT_FOUND, f"{directory} ({place}) {what}")
    config = _config(directory, place)
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            Reason.MODEL_NOT_FOUND, f"no tokenizer in {directory} ({place}): one of {', '.join(TOKENIZERS)} is needed"
        )
    files = _weights(directory, place)
    hashed = _check_manifest(directory, memory, tell)
    tell(100)
    sizes = {path.name: path.stat().st_size for path in files}
    return ModelFacts(
        digest=_digest(directory, files, hashed),
        bytes=sum(sizes.values()),
        architecture=_architecture(config),
        layers=_layers(config),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(Reason.MODEL_CORRUPT, f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(Reason.MODEL_CORRUPT, f"{path} is no JSON object")
    return value


def _config(directory: Path, place: str) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        raise ModelError(Reason.MODEL_NOT_FOUND, f"no {CONFIG} in {directory} ({place})")
    return _json(path)


def _weights(directory: Path, place: str) -> list[Path]:
    index = directory / INDEX
    expected: dict[str, set[str]] = {}
    if index.is_file():
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelError(Reason.MODEL_CORRUPT, f"{index} has no weight_map from tensors to files")
        for tensor, name in weight_map.items():
            expected.setdefault(name, set()).add(tensor)
        _stay_inside(directory, index, expected)
    else:
        expected = {path.name: set() for path in directory.glob("model*.safetensors")}
    if not expected:
        raise ModelError(Reason.MODEL_NOT_FOUND, f"no model*.safetensors in {directory} ({place})")
    missing = sorted(name for name in expected if not (directory / name).is_file())
    if missing:
        some = ", ".join(missing[:5])
        raise ModelError(
            Reason.MODEL_CORRUPT, f"{directory} lacks {len(missing)} of the {len(expected)} files of {INDEX}: {some}"
        )
    for name, wanted in sorted(expected.items()):
        _check_file(directory / name, wanted)
    return [directory / name for name in sorted(expected)]


def _stay_inside(directory: Path, source: Path, names: Iterable[str]) -> None:
    """A model may come from anybody: what its lists name must not make us read other files of the container."""
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ModelError(Reason.MODEL_CORRUPT, f"{source} names {name!r}, which is not inside {directory}")


def _check_file(path: Path, wanted: set[str]) -> None:
    try:
        there = safetensors.tensors(path)
    except safetensors.DamagedError as error:
        raise ModelError(Reason.MODEL_CORRUPT, f"{path} is damaged: {error}") from error
    absent = sorted(wanted - there)
    if absent:
        raise ModelError(
            Reason.MODEL_CORRUPT, f"{path} lacks {len(absent)} tensors that {INDEX} places there, such as {absent[0]!r}"
        )


def _check_manifest(directory: Path, memory: Path, tell: Callable[[int], None]) -> dict[str, str]:
    wanted = manifest(directory)
    _stay_inside(directory, directory / MANIFEST, wanted)
    missing = sorted(name for name in wanted if not (directory / name).is_file())
    if missing:
        raise ModelError(Reason.MODEL_CORRUPT, f"{directory / missing[0]} is missing, {MANIFEST} lists it")
    total = sum((directory / name).stat().st_size for name in wanted) or 1
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        tell(min(99, done * 100 // total))

    hashes = Hashes(memory)
    for name, expected in sorted(wanted.items()):
        actual = hashes.sha256(directory / name, read)
        if actual != expected:
            raise ModelError(
                Reason.MODEL_CORRUPT, f"{directory / name} has sha256 {actual[:16]}…, {MANIFEST} says {expected[:16]}…"
            )
    return wanted


def _digest(directory: Path, weights: list[Path], hashed: dict[str, str]) -> str:
    """One value for "the same model" on every rank: names, sizes, known hashes, and the small files' content."""
    digest = hashlib.sha256()
    for path in weights:
        digest.update(f"{path.name}\0{path.stat().st_size}\0{hashed.get(path.name, '')}\n".encode())
    for name in (CONFIG, INDEX):
        if (directory / name).is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256((directory / name).read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def _architecture(config: dict[str, Any]) -> str | None:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else None


def _layers(config: dict[str, Any]) -> int:
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        for key in _LAYER_KEYS:
            if isinstance(place.get(key), int):
                return int(place[key])
    return 0
