"""Is a directory a whole model? Every file that loading needs is there, and is what it claims to be."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import TooFewLayersError
from mlx_operator_api.tasks import ModelFacts

from . import choice, safetensors
from .hashes import MANIFEST, Hashes, manifest
from .report import Progress
from .request import Request
from .result import ModelError, writable

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
"""What mlx-lm reads."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
"""At least one of them; which one depends on the tokenizer's kind."""
_LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")


def verify(directory: Path, place: str, request: Request, progress: Progress) -> ModelFacts:
    """Check the model in `directory` (of `place`, for messages), with hashes of the files that this rank reads.

    Raises:
        ModelError: with the reason, the file and the numbers.
    """
    try:
        return _verify(directory, place, request, progress)
    except OSError as error:
        # A volume that answers with errors, or files that this user may not read.
        raise ModelError(Reason.MODEL_UNREACHABLE, f"cannot read {error.filename or directory}: {error}") from error


def _verify(directory: Path, place: str, request: Request, progress: Progress) -> ModelFacts:
    check_directory(directory, place)
    found = config(directory, place)
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            Reason.MODEL_NOT_FOUND, f"no tokenizer in {directory} ({place}): one of {', '.join(TOKENIZERS)} is needed"
        )
    expected = index(directory)
    files = sorted(set(expected.values()) or {path.name for path in directory.glob(WEIGHTS)})
    if not files:
        raise ModelError(Reason.MODEL_NOT_FOUND, f"no {WEIGHTS} in {directory} ({place})")
    check(directory, files)
    hashed = check_manifest(directory, _elsewhere(request, expected, found), request.memory, progress)
    return ModelFacts(
        digest=_digest(directory, files, hashed),
        bytes=sum((directory / name).stat().st_size for name in files),
        architecture=architecture(found),
        layers=layers(found),
    )


def check_directory(directory: Path, place: str) -> None:
    """The source leads to a directory.

    Raises:
        ModelError: ModelNotFound.
    """
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "does not exist"
        raise ModelError(Reason.MODEL_NOT_FOUND, f"{directory} ({place}) {what}")


def _elsewhere(request: Request, expected: dict[str, str], found: dict[str, Any]) -> set[str]:
    """Weight files that only other ranks read."""
    try:
        return set(expected.values()) - choice.mine(request, expected, layers(found), tied=tied(found))
    except TooFewLayersError:
        return set()  # refused when it is loaded, with all that is to be said of it


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(Reason.MODEL_CORRUPT, f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(Reason.MODEL_CORRUPT, f"{path} is no JSON object")
    return value


def config(directory: Path, place: str) -> dict[str, Any]:
    """The model's configuration.

    Raises:
        ModelError: there is none, or it is no JSON object.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise ModelError(Reason.MODEL_NOT_FOUND, f"no {CONFIG} in {directory} ({place})")
    return _json(path)


def index(directory: Path) -> dict[str, str]:
    """Tensor to file, by the index; empty without one.

    Raises:
        ModelError: it is damaged, or names files outside of the directory.
    """
    path = directory / INDEX
    if not path.is_file():
        return {}
    weight_map = _json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError(Reason.MODEL_CORRUPT, f"{path} has no weight_map from tensors to files")
    _stay_inside(directory, path, weight_map.values())
    return weight_map


def check(directory: Path, files: Sequence[str]) -> None:
    """Every one of the weight files is there, sound, and has the tensors that the index places in it.

    Raises:
        ModelError: what is missing or damaged.
    """
    missing = sorted(name for name in files if not (directory / name).is_file())
    if missing:
        some = ", ".join(missing[:5])
        raise ModelError(
            Reason.MODEL_CORRUPT, f"{directory} lacks {len(missing)} of the {len(files)} files of {INDEX}: {some}"
        )
    expected: dict[str, set[str]] = {}
    for tensor, name in index(directory).items():
        expected.setdefault(name, set()).add(tensor)
    for name in files:
        _check_file(directory / name, expected.get(name, set()))


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


def check_manifest(directory: Path, elsewhere: set[str], memory: Path, progress: Progress) -> dict[str, str]:
    """Hash what the manifest lists, but for the weights that only other ranks read: they check those.

    Returns name → sha256 as the manifest has it.

    Raises:
        ModelError: what is missing or has another hash.
    """
    wanted = manifest(directory)
    _stay_inside(directory, directory / MANIFEST, wanted)
    missing = sorted(name for name in wanted if not (directory / name).is_file())
    if missing:
        raise ModelError(Reason.MODEL_CORRUPT, f"{directory / missing[0]} is missing, {MANIFEST} lists it")
    mine = sorted(set(wanted) - elsewhere)
    progress.need({str(directory / name): (directory / name).stat().st_size for name in mine})
    hashes = Hashes(memory)
    for name in mine:
        path = directory / name
        actual = hashes.sha256(path, lambda count, path=path: progress.more(str(path), count))  # type: ignore[misc]
        if actual != wanted[name]:
            words = f"{path} has sha256 {actual[:16]}…, {MANIFEST} says {wanted[name][:16]}…"
            raise ModelError(Reason.MODEL_CORRUPT, words)
    return wanted


def _digest(directory: Path, weights: Sequence[str], hashed: dict[str, str]) -> str:
    """One value for "the same model" on every rank: names, sizes, known hashes, and the small files' content."""
    digest = hashlib.sha256()
    for name in weights:
        digest.update(f"{name}\0{(directory / name).stat().st_size}\0{hashed.get(name, '')}\n".encode())
    for name in (CONFIG, INDEX):
        if (directory / name).is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256((directory / name).read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


def architecture(found: dict[str, Any]) -> str | None:
    """What mlx-lm chooses the model's code by; None also for what cannot be written down, which it does not know."""
    kind = found.get("model_type")
    return kind if isinstance(kind, str) and writable(kind) == kind else None


def layers(found: dict[str, Any]) -> int:
    """Number of layers; 0 where the configuration does not say it in a way we know."""
    for place in _places(found):
        for key in _LAYER_KEYS:
            if isinstance(place.get(key), int):
                return int(place[key])
    return 0


def tied(found: dict[str, Any]) -> bool:
    """Whether the head is the embedding, by the configuration."""
    return any(bool(place.get("tie_word_embeddings")) for place in _places(found))


def _places(found: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    text = found.get("text_config")
    return (found, text) if isinstance(text, dict) else (found,)
