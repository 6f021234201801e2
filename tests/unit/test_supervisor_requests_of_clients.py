"""What clients may put into a request body."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_runner import channel
from mlx_runner.supervisor.openai_chat import parse_chat
from mlx_runner.supervisor.openai_errors import ApiError
from mlx_runner.supervisor.openai_models import parse_completion
from mlx_runner.supervisor.openai_responses import parse_responses
from mlx_runner.supervisor.openai_tokens import parse_tokenize

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refusal(body: Any, parse: Any = parse_chat) -> tuple[str | None, str | None, str]:
    def ask() -> None:
        asked = parse(body)
        asked.form()
        asked.rows("id")

    with pytest.raises(ApiError) as caught:
        ask()
    assert caught.value.status == 400
    return caught.value.param, caught.value.code, caught.value.message


def test_every_supported_field_reaches_the_engine() -> None:
    body = {
        **CHAT,
        "temperature": 0,
        "top_p": 0.5,
        "max_completion_tokens": 7,
        "stop": ["a", "b"],
        "seed": 2**32 + 5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "u",
        "metadata": {"k": "v"},
        "store": False,
    }
    asked = parse_chat(body)
    command = asked.rows("id")[0]
    assert (command.id, command.temperature, command.top_p, command.max_tokens) == ("id", 0, 0.5, 7)
    assert (command.stop, command.seed, asked.include_usage()) == (("a", "b"), 5, True)
    assert command.messages == ({"role": "user", "content": "hi"},)


def test_defaults_are_openais_and_every_request_without_a_seed_gets_its_own() -> None:
    first, second = parse_chat(CHAT).rows("1")[0], parse_chat(CHAT).rows("2")[0]
    assert (first.temperature, first.top_p, first.max_tokens, first.stop) == (1, 1, None, ())
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**32


def test_parts_of_text_and_the_developer_role_become_what_templates_know() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {**CHAT, "messages": [{"role": "developer", "content": parts}, {"role": "user", "content": "x"}]}
    messages = parse_chat(body).rows("id")[0].messages
    assert messages == ({"role": "system", "content": "ab"}, {"role": "user", "content": "x"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("tools", []),
        ("tools", None),
        ("tool_choice", "none"),
        ("logprobs", False),
        ("logit_bias", {}),
        ("presence_penalty", 0.0),
        ("response_format", {"type": "text"}),
        ("max_tokens", None),
        ("stop", None),
    ],
)
def test_a_value_that_asks_for_nothing_passes(field: str, value: object) -> None:
    parse_chat({**CHAT, field: value}).rows("id")[0]


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("n", 0, "invalid_value"),
        ("n", 129, "invalid_value"),
        ("n", True, "invalid_value"),
        ("functions", [{}], "unsupported_parameter"),
        ("modalities", ["audio"], "unsupported_parameter"),
        ("prediction", {}, "unsupported_parameter"),
        ("best_of", 2, "unknown_parameter"),
        ("tool_choice", "required", "invalid_value"),
        ("tool_choice", "sometimes", "invalid_value"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, "invalid_value"),
        ("top_logprobs", 2, "invalid_value"),
        ("reasoning_effort", "much", "invalid_value"),
        ("top_k", -2, "invalid_value"),
        ("min_p", 1.5, "invalid_value"),
        ("presence_penalty", 2.5, "invalid_value"),
        ("repetition_penalty", 0, "invalid_value"),
        ("colour", "red", "unknown_parameter"),
        ("temperature", 2.5, "invalid_value"),
        ("temperature", "1", "invalid_value"),
        ("temperature", True, "invalid_value"),
        ("temperature", float("nan"), "invalid_value"),
        ("top_p", 0, "invalid_value"),
        ("max_tokens", 0, "invalid_value"),
        ("max_tokens", 1.5, "invalid_value"),
        ("seed", "x", "invalid_value"),
        ("stop", ["a", "b", "c", "d", "e"], "invalid_value"),
        ("stop", "", "invalid_value"),
        ("stream", "yes", "invalid_value"),
        ("messages", [], "invalid_value"),
        ("messages", "hi", "invalid_value"),
        ("stop", "\ud800", "invalid_value"),
    ],
)
def test_anything_else_is_refused_by_the_name_of_its_field(field: str, value: object, code: str) -> None:
    param, got, message = refusal({**CHAT, field: value})
    assert (param, got) == (field, code)
    assert field in message


@pytest.mark.parametrize("name", ["foo-bar", "Foo", "int", "list", "top_k ", "", "NamedTool"])
def test_an_unknown_field_is_told_by_the_name_that_was_sent(name: str) -> None:
    param, code, message = refusal({**CHAT, name: 1})
    assert (param, code) == (name, "unknown_parameter") and name in message
    param, code, _ = refusal({**CHAT, "messages": [{"role": "user", "content": "x", name: 1}]})
    assert (param, code) == (f"messages[0].{name}", "unknown_parameter")
    choice = {"type": "function", "function": {"name": "f", name: 1}}
    assert refusal({**CHAT, "tools": [TOOL], "tool_choice": choice})[0] == f"tool_choice.function.{name}"


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_the_name_of_whoever_speaks_is_for_the_template(role: str) -> None:
    said = {"role": role, "content": "x", "name": "bob", **({"tool_call_id": "1"} if role == "tool" else {})}
    (command,) = parse_chat({**CHAT, "messages": [said]}).rows("id")
    assert command.messages == (said,)


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "robot", "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"role": "user", "content": None}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[0].tool_calls", "invalid_value"),
        ({"role": "user", "content": "x", "reasoning_content": "x"}, "messages[0].reasoning_content", "invalid_value"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
            "invalid_value",
        ),
        ({"role": "user"}, "messages[0].content", "missing_required_parameter"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            "messages[0].tool_calls[0].function",
            "missing_required_parameter",
        ),
        ({"role": "user", "content": "x", "mood": "sad"}, "messages[0].mood", "unknown_parameter"),
        ({"role": "user", "content": "half a \ud83d pair"}, "messages[0].content", "invalid_value"),
    ],
)
def test_a_message_is_refused_by_its_place(message: dict[str, Any], param: str, code: str) -> None:
    assert refusal({**CHAT, "messages": [message]})[:2] == (param, code)


HALF = {"deep": [{"er": "half a \ud83d pair"}]}
INFINITE = {"minimum": float("inf")}


@pytest.mark.parametrize("value", [HALF, {"half a \udfff pair": 1}, INFINITE])
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("parameters", "tools[0].function.parameters"),
        ("schema", "response_format.json_schema.schema"),
        ("chat_template_kwargs", "chat_template_kwargs"),
    ],
)
def test_json_that_no_engine_could_be_told_is_refused_wherever_it_is(value: Any, field: str, param: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "parameters": {"tools": [{"type": "function", "function": {"name": "f", "parameters": value}}]},
        "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": value}}},
        "chat_template_kwargs": {"chat_template_kwargs": value},
    }
    found = refusal({**CHAT, **bodies[field]})
    assert str(found[0]).startswith(param) and found[1] == "invalid_value"


def test_a_schema_for_a_response_is_refused_when_no_engine_could_be_told() -> None:
    text = {"format": {"type": "json_schema", "name": "n", "schema": HALF}}
    assert refusal({"model": "m", "input": "x", "text": text}, parse_responses_body)[0] == "text.format.schema"
    assert refusal({"messages": CHAT["messages"], "chat_template_kwargs": HALF}, parse_question)[0] is not None


def parse_responses_body(body: Any) -> Any:
    asked = parse_responses(body)
    return SimpleNamespace(form=lambda: None, rows=asked.rows)


def parse_question(body: Any) -> Any:
    asked = parse_tokenize(body)
    return SimpleNamespace(form=lambda: None, rows=asked.question)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('{"x": "\\ud83d"}', "half a surrogate pair"),
        ('{"x": ' + "[" * 100 + "]" * 100 + "}", "deeper than 64"),
        ('{"x": ' + "[" * 20_000 + "]" * 20_000 + "}", "deep"),
        ('{"x": NaN}', "NaN"),
        ('{"x": 1e999}', "no number of JSON"),
        ('{"x": ' + "9" * 10_000 + "}", "digits"),
    ],
)
def test_arguments_of_a_call_are_json_that_an_engine_can_be_told(arguments: str, words: str) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    param, code, message = refusal({**CHAT, "messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert (param, code) == ("messages[0].tool_calls[0].function.arguments", "invalid_value")
    assert words in message and len(message) < 400


def test_what_is_taken_in_can_be_told_to_the_engine_and_read_by_it() -> None:
    deep: Any = "end"
    for _ in range(62):
        deep = {"x": deep}
    call = {"id": "1", "function": {"name": "f", "arguments": json.dumps(deep)}}
    parameters = {"type": "object", "description": "\U0001f600", "default": 10**4000}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {**CHAT, "messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [tool]}
    (command,) = parse_chat(body).rows("id")
    assert channel.decode_command(channel.encode(command)) == command


def test_contradictions_are_refused() -> None:
    assert refusal({**CHAT, "max_tokens": 1, "max_completion_tokens": 2})[0] == "max_tokens"
    with pytest.raises(ApiError, match="only allowed with stream=true"):
        parse_chat({**CHAT, "stream_options": {"include_usage": True}}).include_usage()
    assert refusal([])[2] == "the body must be a JSON object"


def test_a_completion_takes_texts_or_tokens() -> None:
    for prompt, sent in [("hi", ["hi"]), (["hi"], ["hi"]), ([1, 2], [(1, 2)]), (["a", "b"], ["a", "b"])]:
        assert [row.prompt for row in parse_completion({"model": "m", "prompt": prompt}).rows("id")] == sent
    assert refusal({"model": "m", "prompt": ["a"] * 129}, parse_completion)[:2] == ("prompt", "invalid_value")
    assert refusal({"model": "m", "prompt": []}, parse_completion)[:2] == ("prompt", "invalid_value")
    assert refusal({"model": "m", "prompt": [1, -1]}, parse_completion)[1] == "invalid_value"
    assert refusal({"model": "m", "prompt": [1, 1 << 40]}, parse_completion)[1] == "invalid_value"
    assert refusal({"model": "m", "prompt": "\udfff"}, parse_completion)[:2] == ("prompt", "invalid_value")
    assert refusal({"model": "m"}, parse_completion)[:2] == ("prompt", "missing_required_parameter")
    for field, value in [("suffix", "y"), ("echo", True), ("best_of", 2)]:
        assert refusal({"model": "m", "prompt": "x", field: value}, parse_completion)[:2] == (
            field,
            "unsupported_parameter",
        )
    parse_completion({"model": "m", "prompt": "x", "suffix": None, "echo": False, "best_of": 1})


def test_every_choice_is_a_request_of_its_own_with_a_seed_of_its_own() -> None:
    asked = parse_completion({"model": "m", "prompt": ["a", "b"], "n": 2, "seed": 2**32 - 1, "logprobs": 3})
    commands = asked.rows("id")
    assert [(one.id, one.prompt, one.seed) for one in commands] == [
        ("id-0", "a", 2**32 - 1),
        ("id-1", "a", 0),
        ("id-2", "b", 2**32 - 1),
        ("id-3", "b", 0),
    ]
    assert {one.logprobs for one in commands} == {3}
    assert (asked.form().prompts, asked.form().n, asked.form().choices) == (2, 2, 4)


def test_sampling_parameters_reach_the_engine() -> None:
    body = {
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": 5, "8": -100},
        "logprobs": True,
        "top_logprobs": 4,
    }
    (command,) = parse_chat({**CHAT, **body}).rows("id")
    assert (command.top_k, command.min_p, command.presence_penalty, command.frequency_penalty) == (0, 0.1, -1, 0.5)
    assert (command.repetition_penalty, command.logit_bias, command.logprobs) == (1.2, ((7, 5), (8, -100)), 4)
    assert parse_chat({**CHAT, "logprobs": True}).rows("id")[0].logprobs == 0
    for bias in ({"x": 1}, {"-1": 1}, {"1": 101}, {"1": "1"}):
        assert str(refusal({**CHAT, "logit_bias": bias})[0]).startswith("logit_bias")


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        (None, ("auto", None, 1)),
        ("auto", ("auto", None, 1)),
        ("none", ("auto", None, 0)),
        ("required", ("required", None, 1)),
        ({"type": "function", "function": {"name": "f"}}, ("required", "f", 1)),
    ],
)
def test_tools_reach_the_engine_with_what_is_to_be_done_with_them(choice: object, sent: tuple[object, ...]) -> None:
    (command,) = parse_chat({**CHAT, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": None}).rows("id")
    assert (command.tool_choice, command.tool_name, len(command.tools), command.parallel_tool_calls) == (*sent, True)
    if command.tools:
        assert command.tools == (TOOL,)


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}, {"type": "integer"}),
    ],
)
def test_a_response_format_becomes_a_schema(given: dict[str, Any], schema: object) -> None:
    assert parse_chat({**CHAT, "response_format": given}).rows("id")[0].json_schema == schema


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "text", "json_schema": {"name": "n"}}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"schema": 1}}, "response_format.json_schema.schema"),
        ({"type": "grammar"}, "response_format.type"),
    ],
)
def test_a_response_format_is_refused_by_its_part(given: dict[str, Any], param: str) -> None:
    assert refusal({**CHAT, "response_format": given})[0] == param


def test_a_tool_is_refused_by_its_part() -> None:
    assert refusal({**CHAT, "tools": [{"type": "web_search"}]})[0] == "tools[0].type"
    bad = {"type": "function", "function": {"name": "no spaces"}}
    assert refusal({**CHAT, "tools": [bad]})[0] == "tools[0].function.name"
    form = {"type": "json_object"}
    assert refusal({**CHAT, "tools": [TOOL], "response_format": form})[0] == "response_format"


def test_a_conversation_with_calls_is_for_templates_that_take_arguments_as_objects() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    (command,) = parse_chat({**CHAT, "messages": messages}).rows("id")
    function = {"name": "f", "arguments": {"a": 1}}
    assert command.messages == (
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": CHAT["messages"]}, "prompt"),
        ({"prompt": "x", "tools": [TOOL]}, "tools"),
        ({"prompt": "x", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": CHAT["messages"], "add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_what_makes_no_sense_together_is_refused_by_tokenize(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_tokenize(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_conversation_to_tokenize_may_say_that_its_template_writes_the_special_tokens() -> None:
    parse_tokenize({"messages": CHAT["messages"], "add_special_tokens": False, "tools": [TOOL]})
