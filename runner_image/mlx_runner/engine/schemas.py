"""JSON schemas that become a part of another one."""

from collections.abc import Mapping
from typing import Any

_NAMED = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
"""Keywords with schemas by name: the names are no keywords."""
_DATA = frozenset({"const", "default", "enum", "examples"})
"""Keywords with values: what is in them is no schema."""


def moved(schema: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A whole schema as a part of another one: what refers to itself refers to where it is now.

    Args:
        schema: it loses its `$id`, which would be the root of its references.
        place: a JSON pointer as a fragment, such as `#/items`.
    """
    own = str(schema.get("$id", "")).removesuffix("#")
    return {key: _value(key, value, place, own) for key, value in schema.items() if key != "$id"}


def _value(key: str, value: Any, place: str, own: str) -> Any:
    if key in _DATA:
        return value
    if key == "$ref" and isinstance(value, str):
        return _reference(value, place, own)
    if key in _NAMED and isinstance(value, dict):
        return {name: _part(part, place, own) for name, part in value.items()}
    return _part(value, place, own)


def _part(value: Any, place: str, own: str) -> Any:
    match value:
        case list():
            return [_part(one, place, own) for one in value]
        case {"$id": str(name)} if not name.startswith("#"):
            return value  # it is the root of its own references
        case dict():
            return {key: _value(key, one, place, own) for key, one in value.items()}
        case _:
            return value


def _reference(value: str, place: str, own: str) -> str:
    """Anchors, and references to other schemas, stay as they are."""
    fragment = value[len(own) :] if own and value.startswith(own) else value
    return place + fragment.removeprefix("#") if fragment in ("", "#") or fragment.startswith("#/") else value
