"""The fields of a CRD's spec, as its OpenAPI schema has them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mlx_operator_api import crd
from tests.cluster.deploy import ROOT

ITEM, VALUE = "[]", "{}"
"""Steps of a path: into an item of a list, into a value of a map."""
PRESERVE = "x-kubernetes-preserve-unknown-fields"
INT_OR_STRING = "x-kubernetes-int-or-string"
RULES = "x-kubernetes-validations"
Path = tuple[str, ...]


@dataclass(frozen=True)
class Field:
    """A node of the schema below `spec`, `spec` itself included."""

    path: Path
    """Steps from the object: names, `ITEM`, `VALUE`."""
    node: dict[str, Any]
    required: bool
    """Its parent cannot be without it."""

    @property
    def name(self) -> str:
        """`spec.runner.tolerations[].key`."""
        return dotted(self.path)

    @property
    def kind(self) -> str:
        """`string`, `integer`, `boolean`, `array`, `object`, `map` or `quantity`."""
        if self.node.get(INT_OR_STRING):
            return "quantity"
        if "additionalProperties" in self.node:
            return "map"
        return str(self.node["type"])

    @property
    def opaque(self) -> bool:
        """Its content is none of the CRD's business."""
        return bool(self.node.get(PRESERVE))


def dotted(path: Sequence[str | int]) -> str:
    """A path as the API server writes it: indices of lists and keys of maps in brackets."""
    text = ""
    for step in path:
        is_plain = isinstance(step, str) and step not in (ITEM, VALUE) and not step.startswith("[")
        text += f".{step}" if is_plain else f"[{step}]" if isinstance(step, int) else str(step)
    return text.removeprefix(".")


def served() -> dict[str, Any]:
    """The schema of `spec` in the file that is applied."""
    definition = yaml.safe_load((ROOT / "crds" / crd.FILE).read_text(encoding="utf-8"))
    (version,) = definition["spec"]["versions"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


def fields(node: dict[str, Any], path: Path = ("spec",), *, required: bool = True) -> Iterator[Field]:
    """Every field, parents first."""
    yield Field(path, node, required)
    for name, child in node.get("properties", {}).items():
        yield from fields(child, (*path, name), required=name in node.get("required", ()))
    if isinstance(node.get("items"), dict):
        yield from fields(node["items"], (*path, ITEM), required=False)
    if isinstance(node.get("additionalProperties"), dict):
        yield from fields(node["additionalProperties"], (*path, VALUE), required=False)


FIELDS = {field.name: field for field in fields(served())}
"""By name, in the order of the schema."""
