"""Is a directory a whole adapter? Its two files are there, sound, and of a kind that can be fused.

Whether its tensors fit the model is seen when it is loaded.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.names import ADAPTER_FIELD

from . import safetensors, verify
from .choice import ADAPTER_CONFIG as CONFIG
from .choice import ADAPTER_PEFT as PEFT
from .choice import ADAPTER_WEIGHTS as WEIGHTS
from .report import Progress
from .request import Request
from .result import ModelError

FILES = (CONFIG, WEIGHTS)
KINDS = ("lora", "dora")
_FIELDS = ("rank", "scale", "dropout")


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a directory holds."""

    path: Path
    kind: str
    layers: int
    """How many of the last layers are adapted."""
    parameters: dict[str, Any]


@contextmanager
def named() -> Iterator[None]:
    """Let what goes wrong inside name the field of the spec that it is about."""
    try:
        yield
    except ModelError as error:
        raise ModelError(error.reason, f"{ADAPTER_FIELD}: {error.message}") from error


def absent(name: str, there: str, *, peft: bool) -> ModelError:
    """One of the two files is not `there`."""
    hint = f" ({PEFT} is PEFT's form: convert it to mlx-lm's)" if peft else ""
    return ModelError(Reason.MODEL_NOT_FOUND, f"the adapter in {there} has no {name}{hint}")


def inspect(path: Path) -> Adapter:
    """Judge an adapter's files without reading its tensors.

    Raises:
        ModelError: there is none, or it is damaged or of another kind.
    """
    for name in FILES:
        if not (path / name).is_file():
            raise absent(name, str(path), peft=(path / PEFT).is_file())
    try:
        safetensors.tensors(path / WEIGHTS)
        config = json.loads((path / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(Reason.MODEL_CORRUPT, f"the adapter in {path} is damaged: {error}") from error
    except OSError as error:
        raise ModelError(Reason.MODEL_UNREACHABLE, f"cannot read {error.filename or path}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(Reason.MODEL_CORRUPT, f"{CONFIG} of the adapter in {path} holds no JSON object")
    return _read(path, config)


def _read(path: Path, config: dict[str, Any]) -> Adapter:
    kind = config.get("fine_tune_type", KINDS[0])
    if kind not in KINDS:
        message = f"the adapter in {path} has fine_tune_type {kind!r}; supported: {', '.join(KINDS)}"
        raise ModelError(Reason.MODEL_UNSUPPORTED, message)
    layers, parameters = config.get("num_layers"), config.get("lora_parameters")
    known = isinstance(parameters, dict) and all(isinstance(parameters.get(field), int | float) for field in _FIELDS)
    if not isinstance(layers, int) or not isinstance(parameters, dict) or not known:
        needed = f"num_layers and lora_parameters with {', '.join(_FIELDS)}"
        raise ModelError(Reason.MODEL_CORRUPT, f"{CONFIG} of the adapter in {path} lacks some of {needed}")
    return Adapter(path, kind, layers, parameters)


def check(directory: Path, place: str, request: Request, progress: Progress) -> str:
    """Check the adapter in a mounted `directory` (of `place`, for messages); a digest of it.

    Raises:
        ModelError: with the reason, the file and the numbers.
    """
    verify.check_directory(directory, place)
    inspect(directory)
    try:
        hashed = verify.check_manifest(directory, set(), request.memory, progress)
        return digest({name: hashed.get(name) or _content(directory / name) for name in FILES})
    except OSError as error:
        raise ModelError(Reason.MODEL_UNREACHABLE, f"cannot read {error.filename or directory}: {error}") from error


def _content(path: Path) -> str:
    """What tells one file from another: all of a small one, the size of the weights where no hash is known."""
    if path.name == WEIGHTS:
        return str(path.stat().st_size)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(contents: dict[str, str]) -> str:
    """One value for the same adapter on every rank, from what is known of each file."""
    lines = "".join(f"{name}\0{content}\n" for name, content in sorted(contents.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
