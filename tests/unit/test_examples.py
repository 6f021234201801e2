"""The examples: read by the models, complete where they promise it, and true where they state a default."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mlx_operator_api import crd
from mlx_operator_api.deadlines import DEFAULT_DEADLINES
from mlx_operator_api.modelinstance import ModelInstance
from mlx_operator_api.restart_policy import (
    DEFAULT_BACKOFF_INITIAL,
    DEFAULT_BACKOFF_MAX,
    DEFAULT_MAX_RESTARTS,
    DEFAULT_RESET_AFTER,
)
from mlx_operator_api.source import parse
from mlx_operator_api.tasks import ServingOptions

EXAMPLES = sorted((pathlib.Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))
EXCLUDED = {".cache.sizeLimit"}  # excludes claimName


def load(name: str) -> dict[str, Any]:
    (file,) = [file for file in EXAMPLES if file.name == name]
    manifest: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return manifest


def fields(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """Paths of the fields of a schema that a value leaves out, in every item of its lists together."""
    items = value if isinstance(value, list) else [value]
    for name, child in schema.get("properties", {}).items():
        held = [item[name] for item in items if isinstance(item, dict) and name in item]
        if not held:
            yield f"{path}.{name}"
            continue
        inner = child.get("items", child)
        flat = [part for one in held for part in (one if isinstance(one, list) else [one])]
        yield from fields(inner, flat, f"{path}.{name}")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_is_read_by_the_models(file: pathlib.Path) -> None:
    instance = ModelInstance.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    parse(instance.spec.model.source)


def test_full_yaml_has_every_field() -> None:
    spec = crd.schema()["properties"]["spec"]
    assert set(fields(spec, load("full.yaml")["spec"])) == EXCLUDED


def test_full_yaml_states_the_true_defaults() -> None:
    spec = load("full.yaml")["spec"]
    assert spec["deadlines"] == DEFAULT_DEADLINES
    assert spec["restartPolicy"] == {
        "maxRestarts": DEFAULT_MAX_RESTARTS,
        "backoff": {"initial": DEFAULT_BACKOFF_INITIAL, "max": DEFAULT_BACKOFF_MAX},
        "resetAfter": DEFAULT_RESET_AFTER,
    }
    text = next(file for file in EXAMPLES if file.name == "full.yaml").read_text(encoding="utf-8")
    assert f"Requests in work at once. Default: {ServingOptions().max_concurrent_requests}." in text
    assert f"answered 429. Default: {ServingOptions().max_queue}." in text
