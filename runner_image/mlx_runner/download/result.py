"""What the download says to its supervisor: one JSON object a line on its stdout, the result last."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from mlx_operator_api.base import Lenient
from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import ModelFacts


class Percent(Lenient):
    """Progress, 0 to 100, of `total` bytes (0: not known)."""

    kind: Literal["Percent"] = "Percent"
    percent: int
    total: int = 0


class Resolved(Lenient):
    """The commits that the revisions of model and adapter stand for, of a hub; said before anything is fetched."""

    kind: Literal["Resolved"] = "Resolved"
    revision: str | None = None
    adapter_revision: str | None = None


class Trouble(Lenient):
    """Something that may pass, and is tried again: `what` happened, and after how many seconds."""

    kind: Literal["Trouble"] = "Trouble"
    what: str
    seconds: float = 0.0


class Found(Lenient):
    """Every file is present and verified."""

    kind: Literal["Found"] = "Found"
    facts: ModelFacts
    path: Path
    """The directory that looks like the model; may lack the files of other ranks."""
    adapter: Path | None = None
    """The directory of the adapter, where one was asked for."""


class Refused(Lenient):
    """The model cannot be used as it is."""

    kind: Literal["Refused"] = "Refused"
    reason: Reason
    message: str


Said = Percent | Resolved | Trouble | Found | Refused
Line = Annotated[Said, Field(discriminator="kind")]
_USER = re.compile(r"(?<=://)[^\s/]*@")
_LINES: TypeAdapter[Line] = TypeAdapter(Line)


class ModelError(Exception):
    """The model is missing, damaged or out of reach."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = writable(message)


def writable(text: str) -> str:
    """A text in which halves of surrogate pairs are escaped: names in a model's files may have some, no line may."""
    return text.encode(errors="backslashreplace").decode()


def public(text: str) -> str:
    """A text without the user and password of the addresses in it."""
    return _USER.sub("", text)


def encode(line: Said) -> str:
    """One line, without the newline."""
    return line.model_dump_json(by_alias=True, exclude_none=True)


def decode(text: bytes) -> Line:
    """Read a line.

    Raises:
        pydantic.ValidationError: it is none of ours.
    """
    return _LINES.validate_json(text)
