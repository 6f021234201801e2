"""All mutations: the good spec with one field changed, from the schema and the table of values."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from mlx_operator_api import names
from tests.mutation.schema import FIELDS, ITEM, VALUE, Field, dotted
from tests.mutation.values import TABLE, Row

UNICODE = "é漢🙂"
INT64 = 2**63 - 1
_WRONG: dict[str, tuple[Any, ...]] = {
    "string": (7, True, ["x"], {"x": "y"}),
    "integer": ("7", 1.5, True, [7]),
    "boolean": ("yes", 1),
    "quantity": (True, [], {}, 1.5),
    "array": ("x", {}, 7),
    "object": ("x", [], 7),
    "map": ("x", [], 7),
}
"""Values of another type, by kind of field."""


class Sort(StrEnum):
    """What is expected of a mutation."""

    GOOD = "good"
    """The instance ends as one that was made with it, or is told clearly what is wrong."""
    BAD = "bad"
    """It is refused, by the API server or in a condition."""


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One changed field."""

    field: Field
    sort: Sort
    what: str
    at: tuple[str | int, ...]
    """Where it is in the spec: names, indices and keys from `spec` on."""
    base: dict[str, Any] = dataclasses.field(repr=False)
    spec: dict[str, Any] = dataclasses.field(repr=False)
    base_annotations: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)
    annotations: dict[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Says which one it is, in the names of tests."""
        return f"{self.where} {self.what}"

    @property
    def where(self) -> str:
        """`spec.runner.podLabels[team]`, as the API server writes it."""
        return dotted(self.steps)

    @property
    def steps(self) -> list[str | int]:
        """The same, step by step."""
        return [f"[{step}]" if kind == VALUE else step for kind, step in zip(self.field.path, self.at, strict=True)]


_GONE = object()
_ANNOTATION = Field(("metadata", "annotations", VALUE), {"type": "string"}, required=False)


def all_mutations() -> list[Mutation]:
    """Every mutation of every field, in the order of the schema, and of the annotations; no spec twice for a field."""
    made: list[Mutation] = [*_annotations()]
    for each in FIELDS.values():
        if each.name == "spec":
            continue
        seen: set[str] = set()
        for mutation in _of(each):
            text = json.dumps(mutation.spec, sort_keys=True)
            if text not in seen:
                seen.add(text)
                made.append(mutation)
    return made


def _annotations() -> Iterator[Mutation]:
    """Any value acts once; none is wrong."""
    for name in (names.RETRY_ANNOTATION, names.RESTART_ANNOTATION):
        at = ("metadata", "annotations", name)
        for before, after in ((None, "1"), (None, ""), ("1", "2"), ("1", UNICODE), ("1", "a" * 100_000), ("1", None)):
            old, new = ({} if value is None else {name: value} for value in (before, after))
            what = "removed" if after is None else f"{_shown(before)} to {_shown(after)}"
            good = Row().good()
            yield Mutation(_ANNOTATION, Sort.GOOD, what, at, good, good, old, new)


def _of(each: Field) -> Iterator[Mutation]:
    row = TABLE.get(each.name, Row())
    base = row.good()
    at = _address(each, base)
    if at is None:
        return

    def made(sort: Sort, what: str, value: Any) -> Mutation:
        spec = copy.deepcopy(base)
        _put(spec, at[1:], value)
        return Mutation(each, sort, what, at, base, spec)

    yield made(Sort.BAD if each.required else Sort.GOOD, "removed", _GONE)
    yield made(Sort.GOOD, "null", None)
    for value in row.valid:
        yield made(Sort.GOOD, _shown(value), value)
    for value in (*row.bad, *_WRONG[each.kind]):
        yield made(Sort.BAD, _shown(value), value)
    for sort, what, value in _by_kind(each, row, _get(base, at[1:])):
        yield made(sort, what, value)


def _by_kind(each: Field, row: Row, now: Any) -> Iterator[tuple[Sort, str, Any]]:
    match each.kind:
        case "string":
            yield from _strings(each, row, now)
        case "integer":
            yield from _integers(each, now)
        case "boolean":
            yield Sort.GOOD, "flipped", not now
        case "quantity":
            limit = each.node["maxLength"]
            yield Sort.GOOD, "longest", "1".rjust(limit, "0")
            yield Sort.BAD, "too long", "1".rjust(limit + 1, "0")
        case "array":
            yield from _arrays(each, now)
        case "map":
            limit = each.node["maxProperties"]
            yield Sort.GOOD, "empty", {}
            value = next(iter(now.values()))
            yield Sort.GOOD, "most keys", {row.letters(number): value for number in range(limit)}
            yield Sort.BAD, "too many keys", {row.letters(number): value for number in range(limit + 1)}
        case "object":
            yield Sort.GOOD, "empty", {}
            if not each.opaque:
                yield Sort.BAD, "unknown field", {**now, "bogus": 1}


def _strings(each: Field, row: Row, now: str) -> Iterator[tuple[Sort, str, Any]]:
    if words := each.node.get("enum"):
        yield from ((Sort.GOOD, word, word) for word in words)
        yield Sort.BAD, "no such word", "Bogus"
        yield Sort.BAD, "other case", now.lower()
        return
    limit = each.node["maxLength"]
    yield Sort.GOOD, "longest", row.letters(limit)
    yield Sort.BAD, "too long", row.letters(limit + 1)
    yield Sort.BAD if each.node.get("minLength") else Sort.GOOD, "empty", ""
    yield Sort.GOOD, "unicode", f"{now}{UNICODE}"
    yield Sort.GOOD, "line break", f"{now}\nb"


def _integers(each: Field, now: int) -> Iterator[tuple[Sort, str, Any]]:
    low, high = each.node.get("minimum"), each.node.get("maximum", INT64)
    yield Sort.GOOD, "more", now + 1
    yield Sort.GOOD, "highest", high
    yield Sort.BAD, "too high", high + 1
    yield Sort.GOOD, "float", float(now)
    if low is not None:
        yield Sort.GOOD, "lowest", low
        yield Sort.BAD, "too low", low - 1


def _arrays(each: Field, now: list[Any]) -> Iterator[tuple[Sort, str, Any]]:
    limit, first = each.node["maxItems"], now[0]
    yield Sort.GOOD, "empty", []
    yield Sort.GOOD, "reversed", now[::-1]
    keys = each.node.get("x-kubernetes-list-map-keys", ())
    many = [{**first, **dict.fromkeys(keys, f"a{number}")} for number in range(limit + 1)]
    yield Sort.GOOD, "most entries", many[:limit]
    yield Sort.BAD, "too many entries", many


def _address(each: Field, base: dict[str, Any]) -> tuple[str | int, ...] | None:
    """Where the good spec has the field; None: nowhere."""
    found: list[str | int] = ["spec"]
    node: Any = base
    for place, step in enumerate(each.path[1:], 1):
        key: str | int = step
        if step == VALUE:
            key = next(iter(node), "")
        elif step == ITEM:
            after = each.path[place + 1 :][:1]
            key = next((i for i, item in enumerate(node) if not after or after[0] in item), 0)
        try:
            node = node[key]
        except (KeyError, IndexError):
            return None
        found.append(key)
    return tuple(found)


def _get(spec: Any, at: tuple[str | int, ...]) -> Any:
    for step in at:
        spec = spec[step]
    return spec


def _put(spec: Any, at: tuple[str | int, ...], value: Any) -> None:
    holder = _get(spec, at[:-1])
    if value is _GONE:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:50]}…{len(text)}"


MUTATIONS = all_mutations()
