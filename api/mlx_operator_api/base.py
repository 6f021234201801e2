"""Base models and small field types."""

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel


class Lenient(BaseModel):
    """Frozen, camelCase on the wire; unknown fields are ignored: an older reader survives a newer writer."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore", use_attribute_docstrings=True
    )


class Strict(BaseModel):
    """Frozen, camelCase on the wire; an unknown field is a bug of ours and raises `ValidationError`."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    def revised(self, **changes: Any) -> Self:
        """Itself where nothing changes, else a copy: `model_copy` is dear, and most plans change nothing."""
        differ = any(getattr(self, name) != value for name, value in changes.items())
        return self.model_copy(update=changes) if differ else self


def format_time(value: datetime) -> str:
    """RFC 3339, whole seconds, `Z`: the only form that the API server keeps as it is (metav1.Time)."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(value: Any) -> Any:
    """Read an RFC 3339 time into an aware datetime; anything else is left to pydantic."""
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    return value


Time = Annotated[
    datetime,
    BeforeValidator(parse_time),
    PlainSerializer(format_time, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
"""metav1.Time."""


_DURATION = re.compile(r"([0-9]+)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION_PATTERN = r"^([0-9]+(ms|s|m|h))+$"


@lru_cache(maxsize=1024)
def seconds(text: str) -> float:
    """Seconds of a duration such as `90s`, `1h30m` or `500ms`.

    Raises:
        ValueError: the text is not such a duration; the message says what is allowed.
    """
    if not re.fullmatch(DURATION_PATTERN, text):
        raise ValueError(f"{text!r} is no duration: write a number with a unit (ms, s, m, h), for example 90s or 10m")
    return sum(int(number) * _UNITS[unit] for number, unit in _DURATION.findall(text))
