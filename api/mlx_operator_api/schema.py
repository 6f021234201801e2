"""From pydantic's JSON schema to a Kubernetes structural schema (apiextensions/v1).

Pydantic writes draft 2020-12 with references, null arms and numeric exclusive bounds; the API server takes a subset of
OpenAPI 3.0 with every node typed and inlined. What cannot be expressed raises, so that it is seen when the CRD is
generated and not when it is applied.
"""

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

VALIDATIONS = "x-kubernetes-validations"
PRESERVE = "x-kubernetes-preserve-unknown-fields"
INT_OR_STRING = "x-kubernetes-int-or-string"

# Refused by the API server as unknown fields, or mere noise. `default` would be written into users' objects.
_DROPPED = frozenset({"title", "examples", "$defs", "discriminator", "readOnly", "writeOnly", "deprecated", "default"})


class NotStructuralError(TypeError):
    """A model uses something that a structural schema cannot say."""


def structural(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """Translate one node and everything below it.

    Args:
        node: a JSON schema as `BaseModel.model_json_schema` makes it.
        definitions: its `$defs`, for references.

    Raises:
        NotStructuralError: a union of types, or an array whose items differ by position.
    """
    merged = _folded(node, definitions)
    out = {key: value for key, value in merged.items() if key not in _DROPPED}
    if "const" in out:
        out["enum"] = [out.pop("const")]
    if "prefixItems" in out:
        raise NotStructuralError(f"items that differ by position: {out['prefixItems']}")
    for bound in ("minimum", "maximum"):
        if (value := out.pop(f"exclusiveM{bound[1:]}", None)) is not None:
            out[bound] = value
            out[f"exclusiveM{bound[1:]}"] = True
    if "properties" in out:
        out["properties"] = {name: structural(child, definitions) for name, child in out["properties"].items()}
    if "items" in out:
        out["items"] = structural(out["items"], definitions)
    match out.pop("additionalProperties", None):
        case dict() as values:
            out["additionalProperties"] = structural(values, definitions)
        case True if PRESERVE not in out:
            out[PRESERVE] = True
    return {key: out[key] for key in sorted(out, key=_reading_order)}


def _reading_order(key: str) -> tuple[int, str]:
    """What a field is comes first, what lies below it last."""
    return ({"type": 0, "description": 1, "properties": 4, "items": 4, "additionalProperties": 4}.get(key, 3), key)


def _folded(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Schema:
    """Resolve references and drop the null arm of an optional field; what stands outside wins over what is inside."""
    out = dict(node)
    if (reference := out.pop("$ref", None)) is not None:
        out = _over(_folded(definitions[reference.rsplit("/", 1)[-1]], definitions), out)
    if (arms := out.pop("allOf", None)) is not None:
        for arm in arms:
            out = _over(_folded(arm, definitions), out)
    if (arms := out.pop("anyOf", None)) is not None:
        typed = [arm for arm in arms if arm.get("type") != "null"]
        if len(typed) != 1:
            raise NotStructuralError(f"a union of types: {arms}")
        out = _over(_folded(typed[0], definitions), out)
    return out


def _over(inner: Schema, outer: Schema) -> Schema:
    """`outer` on top of `inner`; the CEL rules of both hold."""
    rules = [*inner.get(VALIDATIONS, ()), *outer.get(VALIDATIONS, ())]
    return {**inner, **outer, **({VALIDATIONS: rules} if rules else {})}


def without_enums(node: Schema, keep: frozenset[str] = frozenset()) -> Schema:
    """A copy in which string enums are plain strings, but those of the properties named in `keep`.

    For status: there the operator writes, and a CRD one release behind must not refuse a word that is new. The words
    move into the description, where `kubectl explain` shows them.
    """
    out = dict(node)
    if "properties" in out:
        out["properties"] = {
            name: child if name in keep and "enum" in child else without_enums(child, keep)
            for name, child in out["properties"].items()
        }
    if isinstance(out.get("items"), dict):
        out["items"] = without_enums(out["items"], keep)
    if words := out.pop("enum", None):
        if len(words) <= _WORDS_TOLD:
            out["description"] = f"{out.get('description', '')} One of {', '.join(words)}.".strip()
        out["maxLength"] = 256
    return out


_WORDS_TOLD = 16
"""More than this many words are left to the documentation."""
