"""What clients may put into a request body."""

from typing import Any

import pytest

from mlx_runner.supervisor.openai_errors import ApiError
from mlx_runner.supervisor.openai_models import parse_chat, parse_completion

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refusal(body: Any, parse: Any = parse_chat) -> tuple[str | None, str | None, str]:
    with pytest.raises(ApiError) as caught:
        parse(body).generate("id")
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
    command = asked.generate("id")
    assert (command.id, command.temperature, command.top_p, command.max_tokens) == ("id", 0, 0.5, 7)
    assert (command.stop, command.seed, asked.include_usage()) == (("a", "b"), 5, True)
    assert command.messages == ({"role": "user", "content": "hi"},)


def test_defaults_are_openais_and_every_request_without_a_seed_gets_its_own() -> None:
    first, second = parse_chat(CHAT).generate("1"), parse_chat(CHAT).generate("2")
    assert (first.temperature, first.top_p, first.max_tokens, first.stop) == (1, 1, None, ())
    assert first.seed != second.seed
    assert 0 <= first.seed < 2**32


def test_parts_of_text_and_the_developer_role_become_what_templates_know() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {**CHAT, "messages": [{"role": "developer", "content": parts}, {"role": "user", "content": "x"}]}
    messages = parse_chat(body).generate("id").messages
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
    parse_chat({**CHAT, field: value}).generate("id")


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("n", 2, "unsupported_parameter"),
        ("n", True, "unsupported_parameter"),
        ("tools", [{"type": "function"}], "unsupported_parameter"),
        ("tool_choice", "required", "unsupported_parameter"),
        ("functions", [{}], "unsupported_parameter"),
        ("logprobs", True, "unsupported_parameter"),
        ("top_logprobs", 2, "unsupported_parameter"),
        ("logit_bias", {"1": 5}, "unsupported_parameter"),
        ("response_format", {"type": "json_object"}, "unsupported_parameter"),
        ("presence_penalty", 0.5, "unsupported_parameter"),
        ("frequency_penalty", -1, "unsupported_parameter"),
        ("modalities", ["audio"], "unsupported_parameter"),
        ("reasoning_effort", "low", "unsupported_parameter"),
        ("top_k", 5, "unsupported_parameter"),
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


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": "user"}, "messages[0].content", "missing_required_parameter"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"role": "user", "content": "x", "mood": "sad"}, "messages[0].mood", "unknown_parameter"),
        ({"role": "user", "content": "half a \ud83d pair"}, "messages[0].content", "invalid_value"),
    ],
)
def test_a_message_is_refused_by_its_place(message: dict[str, Any], param: str, code: str) -> None:
    assert refusal({**CHAT, "messages": [message]})[:2] == (param, code)


def test_contradictions_are_refused() -> None:
    assert refusal({**CHAT, "max_tokens": 1, "max_completion_tokens": 2})[0] == "max_tokens"
    with pytest.raises(ApiError, match="only allowed with stream=true"):
        parse_chat({**CHAT, "stream_options": {"include_usage": True}}).include_usage()
    assert refusal([])[2] == "the body must be a JSON object"


def test_a_completion_takes_one_prompt_as_text_or_tokens() -> None:
    for prompt, sent in [("hi", "hi"), (["hi"], "hi"), ([1, 2], (1, 2))]:
        assert parse_completion({"model": "m", "prompt": prompt}).generate("id").prompt == sent
    assert refusal({"model": "m", "prompt": ["a", "b"]}, parse_completion)[:2] == ("prompt", "unsupported_parameter")
    assert refusal({"model": "m", "prompt": []}, parse_completion)[:2] == ("prompt", "invalid_value")
    assert refusal({"model": "m", "prompt": [1, -1]}, parse_completion)[1] == "invalid_value"
    assert refusal({"model": "m", "prompt": [1, 1 << 40]}, parse_completion)[1] == "invalid_value"
    assert refusal({"model": "m", "prompt": "\udfff"}, parse_completion)[:2] == ("prompt", "invalid_value")
    assert refusal({"model": "m"}, parse_completion)[:2] == ("prompt", "missing_required_parameter")
    assert refusal({"model": "m", "prompt": "x", "suffix": "y"}, parse_completion)[0] == "suffix"
    assert refusal({"model": "m", "prompt": "x", "logprobs": 1}, parse_completion)[0] == "logprobs"
