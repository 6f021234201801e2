"""JSON of clients: only what an engine can be told is taken, however deep in a value it is."""

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, JsonValue

MAX_DEPTH = 64
"""What is nested deeper is nobody's request, and more than the channel to the engine can carry."""


class TooDeepError(ValueError):
    """It is nested deeper than `MAX_DEPTH`."""

    def __init__(self) -> None:
        super().__init__(f"nested deeper than {MAX_DEPTH} levels")


def read(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        TooDeepError: it is nested too deep.
        ValueError: it is no JSON.
    """
    try:
        value = json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise TooDeepError from error
    if _deeper(value, MAX_DEPTH):
        raise TooDeepError
    return value


def encodable(text: str) -> str:
    """The text itself. JSON may hold half a surrogate pair; no encoding of text can.

    Raises:
        ValueError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no valid Unicode: half a surrogate pair at character {error.start}") from error
    return text


def sayable(value: Any) -> Any:
    """The value itself, with valid texts and finite numbers at all depths.

    Raises:
        ValueError: another one is in it.
    """
    left = [value]
    while left:
        match left.pop():
            case dict() as found:
                left += [*found.keys(), *found.values()]
            case list() as found:
                left += found
            case str() as text:
                encodable(text)
            case float() as number if not math.isfinite(number):
                _no_number(str(number))
    return value


JsonObject = Annotated[dict[str, JsonValue], AfterValidator(sayable)]
"""A part of a body that is JSON of its own, such as a schema."""


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _deeper(value: Any, limit: int) -> bool:
    """Whether a value is nested deeper than that."""
    level = [value]
    for _ in range(limit):
        level = [child for one in level if isinstance(one, dict | list) for child in _children(one)]
        if not level:
            return False
    return True


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
