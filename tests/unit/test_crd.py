"""The generated CustomResourceDefinition, without an API server."""

import pathlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from pydantic import BaseModel

from mlx_operator.decide.spec import Wanted
from mlx_operator.decide.template import labels
from mlx_operator_api import crd, names
from mlx_operator_api.deadlines import DEFAULT_DEADLINES, Deadlines
from mlx_operator_api.fields import DURATION_RULE, RESERVED_ENV_PREFIXES
from mlx_operator_api.runner_pod import RESERVED_LABELS
from mlx_operator_api.schema import NotStructuralError, structural

ROOT = pathlib.Path(__file__).resolve().parents[2]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a structural schema with its path, the root first."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


@pytest.mark.parametrize("directory", crd.DIRECTORIES)
def test_the_committed_file_is_what_the_models_generate(directory: str) -> None:
    committed = (ROOT / directory / crd.FILE).read_text(encoding="utf-8")
    assert committed == crd.text(), "run: python -m mlx_operator_api.crd --write ."


def test_the_file_is_small_enough_for_plain_kubectl_apply() -> None:
    assert len(crd.text().encode()) < crd.MAX_BYTES


def test_the_yaml_reads_back_as_the_definition() -> None:
    assert yaml.safe_load(crd.text()) == crd.definition()


def test_writing_makes_every_copy(tmp_path: pathlib.Path) -> None:
    files = crd.write(tmp_path)
    assert [file.relative_to(tmp_path).parent.as_posix() for file in files] == list(crd.DIRECTORIES)
    assert {file.read_text(encoding="utf-8") for file in files} == {crd.text()}


def test_every_field_has_a_description_for_kubectl_explain() -> None:
    missing = [
        path
        for path, node in nodes(crd.schema())
        if not path.endswith("[]") and not path.startswith(".metadata") and not node.get("description")
    ]
    assert missing == []


def test_every_node_has_a_type_and_nothing_that_the_api_server_refuses() -> None:
    refused = {"$ref", "$defs", "const", "title", "default", "examples", "deprecated", "uniqueItems", "anyOf", "allOf"}
    for path, node in nodes(crd.schema()):
        assert node.get("type") or node.get("x-kubernetes-int-or-string"), path
        assert not refused & node.keys() - ({"default"} if path == ".status" else set()), path
        assert not ("properties" in node and "additionalProperties" in node), path


def test_every_list_and_map_of_the_spec_is_bounded() -> None:
    for path, node in nodes(crd.schema()["properties"]["spec"], ".spec"):
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path


def test_every_rule_has_words_of_our_own() -> None:
    for path, node in nodes(crd.schema()):
        for rule in node.get("x-kubernetes-validations", ()):
            assert len(rule["message"]) > 10, path


def test_status_has_no_enum_of_ours_so_that_an_older_crd_takes_a_newer_word() -> None:
    status = crd.schema()["properties"]["status"]
    enums = [path for path, node in nodes(status, ".status") if "enum" in node]
    assert enums == [".status.conditions[].status"]


def test_status_has_no_pattern_or_rule_that_could_refuse_our_own_write() -> None:
    status = crd.schema()["properties"]["status"]
    assert [path for path, node in nodes(status) if "pattern" in node or "x-kubernetes-validations" in node] == []


def test_default_deadlines_are_documented_where_users_read_them() -> None:
    deadlines = crd.schema()["properties"]["spec"]["properties"]["deadlines"]["properties"]
    assert set(deadlines) == set(DEFAULT_DEADLINES)
    for name, default in DEFAULT_DEADLINES.items():
        assert f"Default: {default}." in deadlines[name]["description"], name


def test_a_duration_of_the_longest_form_is_read_by_the_models_too() -> None:
    assert DURATION_RULE.startswith("^(")
    assert Deadlines(load="999999h999999h").of("load") == pytest.approx(2 * 999999 * 3600)


def test_every_label_of_a_runner_pod_is_refused_in_pod_labels() -> None:
    wanted = cast("Wanted", SimpleNamespace(name="tiny", uid="u"))
    ours = {label for label in labels(wanted, 0) if not label.startswith(f"{names.GROUP}/")}
    assert ours == set(RESERVED_LABELS)


def test_every_variable_that_the_operator_sets_is_refused_in_env() -> None:
    variables = [value for name, value in vars(names).items() if name.startswith("ENV_")]
    assert len(variables) > 5
    assert [name for name in variables if not name.startswith(RESERVED_ENV_PREFIXES)] == []


def test_a_union_of_types_is_refused_when_generating_and_not_when_applying() -> None:
    class Union(BaseModel):
        value: int | list[str]

    raw = Union.model_json_schema()
    with pytest.raises(NotStructuralError, match="union of types"):
        structural(raw, raw.get("$defs", {}))


def test_an_exclusive_bound_becomes_a_flag_beside_the_bound() -> None:
    assert structural({"type": "integer", "exclusiveMaximum": 64}, {}) == {
        "type": "integer",
        "maximum": 64,
        "exclusiveMaximum": True,
    }


def test_rules_of_a_type_and_of_its_field_both_hold() -> None:
    inner = {"type": "string", "x-kubernetes-validations": [{"rule": "a"}]}
    outer = {"anyOf": [inner, {"type": "null"}], "x-kubernetes-validations": [{"rule": "b"}]}
    assert structural(outer, {})["x-kubernetes-validations"] == [{"rule": "a"}, {"rule": "b"}]
