"""Sampling, logprobs, grammars and tool calls in a real engine: alone and in company."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_runner import channel

from . import tiny_models
from .conftest import PROMPTS, TOKENS
from .engine_ranks import Rank, Ranks, generate, running

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rom", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}
ASK: dict[str, Any] = {"messages": ({"role": "user", "content": "the runner"},), "max_tokens": 200}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A model with tools and thinking in its template."""
    directory = tmp_path_factory.mktemp("thinker")
    model = tiny_models.build(directory / "model", "qwen2")
    tiny_models.write_tokenizer(model, tiny_models.TOOLS_TEMPLATE, tiny_models.TOOLS_TOKENS)
    with running(directory, 1) as ranks:
        yield ranks.serve(model)


def chat(request: str, **options: Any) -> channel.Generate:
    return channel.Generate(id=request, **{**ASK, "template_options": {"enable_thinking": False}, **options})


def deltas(rank: Rank, request: str) -> list[channel.Delta]:
    rank.answer(request)
    return [event for event in rank.seen if isinstance(event, channel.Delta) and event.id == request]


def refusal(rank: Rank, command: channel.Command) -> channel.Refused:
    rank.send(command)
    return rank.expect(channel.Refused)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_k": 20, "seed": 1},
    {"temperature": 0.9, "min_p": 0.05, "seed": 2},
    {"temperature": 1.2, "presence_penalty": 1.0, "frequency_penalty": 0.5, "seed": 3},
    {"temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.9, "seed": 4},
    {"logit_bias": ((50, 30.0),), "logprobs": 3},
    {"temperature": 1.0, "seed": 5, "json_schema": PERSON, "max_tokens": 120},
]


def test_every_way_to_sample_gives_the_same_alone_and_in_company(pipeline: Ranks) -> None:
    leader = pipeline[0]

    def ask(name: str, number: int) -> None:
        options = {"max_tokens": TOKENS, **OPTIONS[number]}
        leader.send(generate(name, PROMPTS[number % len(PROMPTS)], options.pop("max_tokens"), **options))

    alone = []
    for number in range(len(OPTIONS)):
        ask(f"one-{number}", number)
        alone.append(leader.answer(f"one-{number}").tokens)
    for number in range(len(OPTIONS)):
        ask(f"many-{number}", number)
    assert [leader.answer(f"many-{number}").tokens for number in range(len(OPTIONS))] == alone
    assert len({tuple(tokens) for tokens in alone}) == len(OPTIONS)


def test_an_answer_that_must_be_json_follows_its_schema_and_ends_with_it(pipeline: Ranks) -> None:
    leader = pipeline[0]
    for seed in range(4):
        leader.send(generate(f"json-{seed}", PROMPTS[seed], 150, temperature=1.0, seed=seed, json_schema=PERSON))
    for seed in range(4):
        answer = leader.answer(f"json-{seed}")
        assert answer.finished is not None and answer.finished.finish_reason == "stop"
        person = json.loads(answer.text)
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 99
        assert 2 not in answer.tokens, "the closing brace is the end"


def test_a_schema_that_is_none_is_refused_with_the_librarys_words(single: Ranks) -> None:
    refused = refusal(single[0], generate("bad", PROMPTS[0], 5, json_schema={"type": "frobnicate"}))
    assert (refused.status, refused.param) == (400, "response_format")
    assert "frobnicate" in refused.message


def test_logprobs_are_those_of_the_greedy_choice(single: Ranks) -> None:
    single[0].send(generate("likely", PROMPTS[0], 6, logprobs=2))
    found = [one for delta in deltas(single[0], "likely") for one in delta.logprobs]
    assert len(found) == 6
    for one in found:
        assert one.top[0].logprob == one.logprob >= one.top[1].logprob
        assert one.top[0].token == one.token
        assert sum(math.exp(top.logprob) for top in one.top) <= 1
    single[0].send(generate("plain", PROMPTS[0], 6))
    assert not any(delta.logprobs for delta in deltas(single[0], "plain"))


@pytest.mark.parametrize(("parallel", "name"), [(True, None), (False, None), (True, "clock")])
def test_a_tool_call_that_is_demanded_comes(thinker: Ranks, parallel: bool, name: str | None) -> None:
    leader, request = thinker[0], f"call-{parallel}-{name}"
    leader.send(
        chat(
            request,
            tools=(WEATHER, CLOCK),
            tool_choice="required",
            tool_name=name,
            parallel_tool_calls=parallel,
            seed=3,
        )
    )
    calls = [call for delta in deltas(leader, request) for call in delta.tool_calls]
    answer = leader.answer(request)
    assert answer.text == "" and answer.finished is not None
    if answer.finished.finish_reason == "length":
        assert parallel and len(calls) > 1, "one call after the other, up to max_tokens"
    else:
        assert answer.finished.finish_reason == "tool_calls"
    assert calls and (parallel or len(calls) == 1)
    for call in calls:
        assert call.name in ({name} if name else {"weather", "clock"})
        arguments = json.loads(call.arguments)
        assert arguments == {} if call.name == "clock" else arguments["city"] in {"Rom", "Oslo"}


def test_what_the_model_thinks_is_free_and_the_grammar_is_for_the_answer(thinker: Ranks) -> None:
    leader = thinker[0]
    end = tiny_models.TOOLS_TOKENS.index("</think>")
    first = refusal(leader, channel.Detokenize(id="none", tokens=(10**6,)))
    assert first.param == "tokens"
    leader.send(channel.Tokenize(id="marks", prompt="".join(tiny_models.TOOLS_TOKENS)))
    marks = leader.expect(channel.Tokenized).tokens
    # The bias makes the thinking end at once; without it a random model would go on.
    bias = ((marks[end], 60.0),)
    leader.send(chat("thinks", json_schema=PERSON, template_options={"enable_thinking": True}, logit_bias=bias, seed=9))
    answer = leader.answer("thinks")
    assert answer.tokens[0] == marks[end]
    assert set(json.loads(answer.text)) == {"name", "age"}
    leader.send(chat("only-thinks", template_options={"enable_thinking": True}, max_tokens=5))
    reasoning = "".join(delta.reasoning for delta in deltas(leader, "only-thinks"))
    finished = leader.answer("only-thinks").finished
    assert finished is not None and (finished.finish_reason, finished.reasoning_tokens) == ("length", 5)
    assert reasoning and leader.answer("only-thinks").text == ""


def test_the_template_says_what_can_be_asked_of_it(thinker: Ranks, single: Ranks) -> None:
    cases: list[tuple[Rank, dict[str, Any], str]] = [
        (thinker[0], {"template_options": {"colour": 1}}, "chat_template_kwargs.colour"),
        (thinker[0], {"template_options": {"tools": []}}, "chat_template_kwargs.tools"),
        (thinker[0], {"reasoning_effort": "high"}, "reasoning_effort"),
        (single[0], {"template_options": {}, "tools": (WEATHER,)}, "tools"),
        (single[0], {"template_options": {}, "reasoning_effort": "none"}, "reasoning_effort"),
        (thinker[0], {"logit_bias": ((10**6, 1.0),)}, "logit_bias"),
        (
            thinker[0],
            {
                "tools": ({"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}},),
                "tool_choice": "required",
            },
            "tools",
        ),
    ]
    for number, (rank, options, param) in enumerate(cases):
        refused = refusal(rank, chat(f"refused-{number}", **options))
        assert (refused.status, refused.param) == (400, param), refused


def test_a_conversation_with_calls_and_their_results_is_taken(thinker: Ranks) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rom"}}}
    messages = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun", "tool_call_id": "1"},
    )
    thinker[0].send(channel.Tokenize(id="talk", messages=messages, tools=(WEATHER,)))
    tokens = thinker[0].expect(channel.Tokenized)
    thinker[0].send(channel.Detokenize(id="talk", tokens=tokens.tokens))
    text = thinker[0].expect(channel.Detokenized).prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>' in text
    assert "sun" in text and tokens.max_model_len == tiny_models.CONTEXT


def test_a_model_that_writes_no_json_calls_cannot_be_made_to(tmp_path: Path) -> None:
    model = tiny_models.build(tmp_path / "model", "qwen2")
    template = tiny_models.TOOLS_TEMPLATE.replace("<tool_call>\n{", "<tool_call>\n<function={")
    tiny_models.write_tokenizer(model, template, tiny_models.TOOLS_TOKENS)
    with running(tmp_path, 1) as ranks:
        ranks.serve(model)
        refused = refusal(ranks[0], chat("forced", tools=(WEATHER,), tool_choice="required"))
        assert (refused.param, refused.code) == ("tool_choice", "unsupported_parameter")
        ranks[0].send(chat("free", tools=(WEATHER,), max_tokens=3))
        assert ranks[0].answer("free").finished is not None
