"""The generated parts of docs/serving.md: endpoints and fields, from the models that validate requests."""

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_runner.supervisor.openapi import ENDPOINTS, document

Schema = Mapping[str, Any]


def endpoints() -> str:
    """What there is on the public port."""
    rows = [
        f"| `{one.method.upper()} {one.path}` | {one.summary} | {'yes' if one.stream else ''} | "
        f"{'yes' if one.protected else ''} |\n"
        for one in ENDPOINTS
    ]
    return "| Endpoint | Use | Streams | Asks for an API key |\n| --- | --- | --- | --- |\n" + "".join(rows)


def fields() -> str:
    """The fields of every body, and of what is in them."""
    schemas = document()["components"]["schemas"]
    told = [one.body.__name__ for one in ENDPOINTS if one.body is not None]
    titles = {one.body.__name__: f"`{one.path}`" for one in ENDPOINTS if one.body is not None}
    text = ""
    for name in told:
        text += f"### {titles.get(name, f'`{name}`')}\n\n{_table(schemas[name])}\n"
        found = dict.fromkeys(_references(schemas[name]))
        told += [other for other in found if other not in told and "properties" in schemas[other]]
    return text


def _table(schema: Schema) -> str:
    required = schema.get("required", [])
    accepted = [name for name, field in schema["properties"].items() if _empty(field)]
    neutral = [name for name, field in schema["properties"].items() if _neutral(field)]
    text = "| Field | Type | Meaning |\n| --- | --- | --- |\n"
    for name, field in schema["properties"].items():
        if name in accepted or name in neutral:
            continue
        mark = " (required)" if name in required else ""
        text += f"| `{name}`{mark} | {_type(field)} | {field.get('description', '').replace(chr(10), ' ')} |\n"
    if neutral:
        text += f"\nNot supported, and only accepted with a value that asks for nothing: {_names(neutral)}.\n"
    if accepted:
        text += f"\nAccepted without effect on the answer: {_names(accepted)}.\n"
    return text


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _empty(field: Schema) -> bool:
    return set(field) == {"description"}


def _neutral(field: Schema) -> bool:
    return field.get("type") == "null" or field.get("description", "").startswith("Not supported:")


def _type(field: Schema) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(arm) for arm in field["anyOf"] if arm.get("type") != "null"))
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return "JSON" if name == "JsonValue" else f"`{name}`"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    match field.get("type"):
        case "array":
            return f"list of {_type(field['items'])}"
        case "object":
            values = next(iter(field.get("patternProperties", {}).values()), None)
            return f"object of {_type(values)}" if values else "object"
        case "number" | "integer" as kind:
            return f"{kind}{_range(field)}"
        case kind:
            return str(kind or "any")


def _range(field: Schema) -> str:
    bounds = [
        (field.get("minimum"), "≥"),
        (field.get("exclusiveMinimum"), "\\>"),
        (field.get("maximum"), "≤"),
        (field.get("exclusiveMaximum"), "<"),
    ]
    told = [f"{sign} {bound}" for bound, sign in bounds if bound is not None and abs(bound) < 1 << 31]
    return f" {', '.join(told)}" if told else ""


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for child in node.values():
            yield from _references(child)
    elif isinstance(node, list):
        for child in node:
            yield from _references(child)
