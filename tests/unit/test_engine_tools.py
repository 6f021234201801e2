"""Forced tool calls: the schema of each tool means the same where the grammar of the answer has it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from mlx_runner.engine import tools
from mlx_runner.engine.grammar import Grammars
from mlx_runner.engine.text import ToolFormat

JSON_TOOLS = ToolFormat("json_tools", "<tool_call>", "</tool_call>", lambda text, tools: None)
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", lambda text, tools: None)


def place(field: str, **more: Any) -> dict[str, Any]:
    """A schema with a definition that has the same name in every tool."""
    definition = {"type": "object", "properties": {field: {"type": "string"}}, "required": [field]}
    return {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"Place": {**definition, "additionalProperties": False}},
        **more,
    }


CITY, STREET = {"at": {"city": "x"}}, {"at": {"street": "x"}}


def call(name: str, arguments: Any, form: ToolFormat = JSON_TOOLS) -> str:
    text = json.dumps({"name": name, "arguments": arguments}, separators=(",", ":"))
    return f"[TOOL_CALLS][{text}]" if form is MISTRAL else f"<tool_call>\n{text}\n</tool_call>"


def allows(schemas: Sequence[Any], text: str, form: ToolFormat = JSON_TOOLS) -> bool:
    """Whether a grammar that forces calls of tools `t0`, `t1`, … allows a whole answer."""
    given = [{"type": "function", "function": {"name": f"t{n}", "parameters": one}} for n, one in enumerate(schemas)]
    grammars = Grammars(lambda: None, 256, frozenset())
    lark = tools.forced(grammars, form, given, many=True, token_of=lambda text: None)
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


@pytest.mark.parametrize("form", [JSON_TOOLS, MISTRAL], ids=lambda form: form.name)
def test_a_definition_is_that_of_its_own_tool(form: ToolFormat) -> None:
    assert allows([place("city")], call("t0", CITY, form), form)
    assert not allows([place("city")], call("t0", STREET, form), form)
    both = [place("city"), place("street")]
    assert allows(both, call("t0", CITY, form), form) and allows(both, call("t1", STREET, form), form)
    assert not allows(both, call("t0", STREET, form), form) and not allows(both, call("t1", CITY, form), form)


@pytest.mark.parametrize(
    "more",
    [
        {"$id": "https://example.com/place"},
        {"$schema": "http://json-schema.org/draft-07/schema#"},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/place"},
        {"$id": "https://example.com/p", "properties": {"at": {"$ref": "https://example.com/p#/$defs/Place"}}},
    ],
)
def test_a_schema_may_say_what_it_is(more: dict[str, Any]) -> None:
    both = [place("city", **more), place("street", **more)]
    assert allows(both, call("t0", CITY)) and allows(both, call("t1", STREET))
    assert not allows(both, call("t0", STREET)) and not allows(both, call("t1", CITY))


def test_a_schema_may_be_a_reference_to_a_part_of_itself() -> None:
    numbers = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
    named = {"$ref": "#/definitions/Args", "definitions": {"Args": numbers}}
    assert allows([named, place("city")], call("t0", {"n": 1}))
    assert not allows([named, place("city")], call("t0", {"n": "x"}))


def test_a_schema_may_refer_to_the_whole_of_itself() -> None:
    properties = {"value": {"type": "integer"}, "next": {"$ref": "#"}}
    linked = {"type": "object", "properties": properties, "required": ["value"], "additionalProperties": False}
    assert allows([linked], call("t0", {"value": 1, "next": {"value": 2, "next": {"value": 3}}}))
    assert not allows([linked], call("t0", {"value": 1, "next": {"next": {}}}))


def test_a_schema_with_a_name_of_its_own_inside_is_left_as_it_is() -> None:
    inner = place("city", **{"$id": "https://example.com/inner"})
    outer = {"type": "object", "properties": {"in": inner}, "required": ["in"], "additionalProperties": False}
    assert allows([outer], call("t0", {"in": CITY}))
    assert not allows([outer], call("t0", {"in": STREET}))


def test_what_only_looks_like_a_reference_is_no_reference() -> None:
    value = {"$ref": "#/$defs/Place"}
    constant = {"type": "object", "properties": {"x": {"const": value}}, "required": ["x"]}
    assert allows([constant], call("t0", {"x": value}))
    assert allows([{"type": "object", "properties": {"x": {"enum": [value]}}}], call("t0", {"x": value}))
    # Names of properties are no keywords.
    names = {"$ref": {"type": "string"}, "const": {"$ref": "#/$defs/N"}, "default": {"$ref": "#/$defs/N"}}
    named = {"type": "object", "properties": names, "$defs": {"N": {"type": "integer"}}, "additionalProperties": False}
    assert allows([named], call("t0", {"$ref": "#/x", "const": 1, "default": 2}))
    assert not allows([named], call("t0", {"const": "x"}))
