"""The files of a model, judged before anything is read: what is missing or damaged gets its name here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_runner.download import safetensors

from .failures import EngineError

INDEX = "model.safetensors.index.json"
_PATTERN = "model*.safetensors"
"""The files that mlx-lm reads."""


@dataclass(frozen=True, slots=True)
class Files:
    """What a directory holds: the configuration, and in which file the index expects each tensor."""

    path: Path
    config: dict[str, Any]
    expected: dict[str, str]
    """Tensor to file name, by the index (empty without one)."""


def inspect(path: Path) -> Files:
    """Look at a model's directory.

    Raises:
        EngineError: there is no model, or a file of it is damaged.
    """
    if not path.is_dir():
        raise EngineError(Reason.MODEL_NOT_FOUND, f"{path} is no directory")
    if not (path / "config.json").is_file():
        raise EngineError(Reason.MODEL_NOT_FOUND, f"{path} has no config.json ({_listing(path)})")
    config = _json(path / "config.json")
    present = sorted(path.glob(_PATTERN))
    expected = _index(path)
    if not present:
        raise EngineError(Reason.MODEL_NOT_FOUND, f"{path} has no {_PATTERN} ({_listing(path)})")
    for file in present:
        _check(file)
    return Files(path, config, expected)


def _check(file: Path) -> None:
    try:
        safetensors.tensors(file)
    except safetensors.DamagedError as error:
        raise EngineError(Reason.MODEL_CORRUPT, f"{file.name} is damaged: {error}") from error
    except OSError as error:
        raise EngineError(Reason.MODEL_CORRUPT, f"{file.name} cannot be read: {error.strerror}") from error


def _index(path: Path) -> dict[str, str]:
    if not (path / INDEX).is_file():
        return {}
    weight_map = _json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise EngineError(Reason.MODEL_CORRUPT, f"{INDEX} has no weight_map")
    return {str(tensor): str(file) for tensor, file in weight_map.items()}


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise EngineError(Reason.MODEL_CORRUPT, f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise EngineError(Reason.MODEL_CORRUPT, f"{file.name} holds no JSON object")
    return value


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return f"it holds {', '.join(names[:5])}{', …' if len(names) > 5 else ''}" if names else "it is empty"


def missing(files: Files, tensors: list[str]) -> EngineError:
    """The failure for tensors that this rank needs and no file holds."""
    name = tensors[0]
    more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
    file = files.expected.get(name)
    if file is not None and not (files.path / file).is_file():
        return EngineError(Reason.MODEL_CORRUPT, f"{file} is missing: the index expects tensor {name} in it{more}")
    place = f"{file}, where the index expects it" if file else "the safetensors files"
    return EngineError(Reason.MODEL_CORRUPT, f"tensor {name}{more} is not in {place}")
