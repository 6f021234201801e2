"""The parts of an answer: text, reasoning and tool calls, whatever way the tokens are cut."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder

from mlx_runner.channel import Generate, ToolCall
from mlx_runner.engine.answer import AnswerText
from mlx_runner.engine.sampler import Logprobs
from mlx_runner.engine.sections import Kind, Sections
from mlx_runner.engine.text import Thinking, Tokenizer, ToolFormat

EOS, THINK, NO_THINK, CALL, NO_CALL, PAD = range(256, 262)
NAMES = {
    EOS: "<|end|>",
    THINK: "<think>",
    NO_THINK: "</think>",
    CALL: "<tool_call>",
    NO_CALL: "</tool_call>",
    PAD: "<|pad|>",
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TEMPLATE = "{% if enable_thinking %}"


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8 and some markers."""

    has_chat_template = True
    chat_template = TEMPLATE

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return b"".join(NAMES[t].encode() if t in NAMES else bytes([t]) for t in tokens).decode(errors="replace")

    def get_vocab(self) -> dict[str, int]:
        return {name: token for token, name in NAMES.items()}


THINKING = Thinking("<think>", "</think>", (THINK,), (NO_THINK,))


def tokenizer(tools: Any = json_tools, thinking: Thinking | None = THINKING) -> Tokenizer:
    form = ToolFormat(
        tools.__name__.rpartition(".")[2], tools.tool_call_start, tools.tool_call_end, tools.parse_tool_call
    )
    special = frozenset({EOS, PAD, CALL})
    return Tokenizer(Bytes(), 262, frozenset({EOS}), special=special, thinking=thinking, tools=form)


@dataclass
class Told:
    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    tokens: int = 0
    ended: bool = False

    @property
    def functions(self) -> list[tuple[str, Any]]:
        return [(call.name, json.loads(call.arguments)) for call in self.calls]


def tokens_of(text: str) -> list[int]:
    """Markers are one token each, where the tokenizer has them."""
    for token, name in NAMES.items():
        before, found, after = text.partition(name)
        if found:
            return [*tokens_of(before), token, *tokens_of(after)]
    return list(text.encode())


def told(
    text: str, *, of: Tokenizer | None = None, prompt: Sequence[int] = (), end: bool = True, **request: Any
) -> Told:
    """What a client is told of an answer; up to the place where it has ended for the client."""
    request = {"tools": (WEATHER,), "messages": ({"role": "user", "content": "?"},), **request}
    answer = AnswerText(of or tokenizer(), Generate(id="r", **request), prompt)
    tokens, said = [*tokens_of(text), *([EOS] if end else [])], Told()
    for number, token in enumerate(tokens):
        news = answer.add(token, last=number == len(tokens) - 1)
        said.text += news.text
        said.reasoning += news.reasoning
        said.calls += news.calls
        if answer.ended:
            break
    said.tokens, said.ended = answer.tokens, answer.ended
    return said


CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def test_reasoning_calls_and_text_are_told_apart() -> None:
    said = told(f"<think>\nWhich city?\n</think>\n\nI look it up.{CALL_TEXT}\n{CALL_TEXT}")
    assert (said.text, said.reasoning) == ("I look it up.", "Which city?\n")
    assert said.functions == [("weather", {"city": "Köln"})] * 2
    assert [call.index for call in said.calls] == [0, 1]
    assert len({call.id for call in said.calls}) == 2


def test_an_answer_whose_prompt_ended_in_reasoning_begins_there() -> None:
    said = told("\nhm</think>yes", prompt=[65, THINK, 10])
    assert (said.reasoning, said.text) == ("hm", "yes")
    assert told("yes", prompt=[THINK, 65, NO_THINK]).text == "yes"
    assert told("never ends", prompt=[THINK]).reasoning == "never ends"


def test_without_tools_or_without_a_chat_markers_are_text() -> None:
    assert told(CALL_TEXT, tools=()).text == CALL_TEXT.replace("<tool_call>", "", 1), (
        "this one's first marker is special"
    )
    said = told("<think>a</think>b", messages=None, prompt=())
    assert (said.text, said.reasoning) == ("<think>a</think>b", "")


def test_special_tokens_are_no_text() -> None:
    assert told(f"a<|pad|>b<think>c<|pad|>d</think>{CALL_TEXT}").text == "ab"
    assert told(f"a<|pad|>b<think>c<|pad|>d</think>{CALL_TEXT}").reasoning == "cd"
    assert told("a<|pad|>b", messages=None).text == "ab"


@pytest.mark.parametrize(
    "text", ["<tool_call>{nonsense</tool_call>", '<tool_call>{"name": 7}</tool_call>', "<tool_call>[]x"]
)
def test_what_is_no_call_is_given_as_the_text_that_it_is(text: str) -> None:
    said = told(f"before {text}")
    assert (said.text, said.calls) == (f"before {text}", [])


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (json_tools, '<tool_call>{"name": "weather", "arguments": {"x": "\\ud83d"}}</tool_call>'),
        (json_tools, '<tool_call>{"name": "half \\ud83d", "arguments": {}}</tool_call>'),
        (json_tools, '<tool_call>{"name": "weather", "arguments": {"x": 1e999}}</tool_call>'),
        (json_tools, '<tool_call>{"name": "weather", "arguments": {"x": NaN}}</tool_call>'),
        (json_tools, '<tool_call>{"name": "weather", "arguments": "no JSON"}</tool_call>'),
        (json_tools, '<tool_call>{"name": "weather", "arguments": "{\\"x\\": NaN}"}</tool_call>'),
        (json_tools, "<tool_call>" + "[" * 20_000 + "</tool_call>"),
        *(
            (qwen3_coder, f"<tool_call><function=weather><parameter={name}>{value}</parameter></function></tool_call>")
            for name, value in [
                ("x", "{1, 2}"),
                ("x", "b'a'"),
                ("x", "..."),
                ("x", "1j"),
                ("x", "-" * 20_000 + "1"),
                ("n", "1e999"),
                ("n", "nan"),
                ("n", "1e4999"),
            ]
        ),
    ],
)
def test_a_call_whose_arguments_are_no_json_is_given_as_the_text_that_it_is(parser: Any, text: str) -> None:
    properties = {"x": {"type": "array"}, "n": {"type": "integer"}}
    function = {"name": "weather", "parameters": {"type": "object", "properties": properties}}
    said = told(f"before {text}", of=tokenizer(parser), tools=({"type": "function", "function": function},))
    assert (said.text, said.calls) == (f"before {text}", [])


def test_a_call_that_is_cut_short_is_no_call() -> None:
    said = told(CALL_TEXT[:-14], end=False)
    assert said.calls == [] and said.text == CALL_TEXT[:-14]


def test_with_one_call_allowed_the_answer_ends_after_it() -> None:
    said = told(f"{CALL_TEXT}{CALL_TEXT}and more", parallel_tool_calls=False)
    assert (said.text, len(said.calls), said.ended) == ("", 1, True)


def test_a_stop_string_is_looked_for_in_text_only() -> None:
    said = told(f"<think>STOP</think>{CALL_TEXT}go on STOP here", stop=("STOP", "Köln"))
    assert (said.reasoning, said.text, said.functions) == ("STOP", "go on ", [("weather", {"city": "Köln"})])
    assert said.ended


def test_ids_are_the_same_when_a_request_is_given_its_tokens_again() -> None:
    assert told(CALL_TEXT).calls == told(CALL_TEXT).calls


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        (mistral, '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rom"}}]'),
        (mistral, '[TOOL_CALLS]weather[ARGS]{"city": "Rom"}'),
        (
            qwen3_coder,
            "<tool_call>\n<function=weather>\n<parameter=city>\nRom\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_the_parser_is_that_of_the_model(parser: Any, text: str) -> None:
    said = told(f"Well. {text}", of=tokenizer(parser))
    assert (said.text, said.functions) == ("Well. ", [("weather", {"city": "Rom"})])


PARTS = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "<t", "tool_call>", "ab", "é", " ", "</"]
    ),
    max_size=12,
)


@settings(deadline=None)
@given(PARTS, st.randoms())
def test_the_pieces_do_not_depend_on_how_the_text_is_cut(parts: list[str], random: Any) -> None:
    text = "".join(parts)

    def cut(sizes: Any) -> list[tuple[Kind, str]]:
        sections, at, pieces = Sections(("<think>", "</think>"), ("<tool_call>", "</tool_call>")), 0, []
        while at < len(text):
            size = sizes()
            pieces += sections.add(text[at : at + size])
            at += size
        joined: list[tuple[Kind, str]] = []
        for piece in [*pieces, *sections.flush()]:
            if joined and joined[-1][0] is piece.kind is not Kind.CALL:
                joined[-1] = (piece.kind, joined[-1][1] + piece.text)
            else:
                joined.append((piece.kind, piece.text))
        return joined

    assert cut(lambda: random.randint(1, 4)) == cut(lambda: max(1, len(text)))


def test_logprobs_say_the_text_of_each_token_and_its_bytes_where_it_has_whole_characters() -> None:
    answer = AnswerText(tokenizer(), Generate(id="r", messages=({},)), ())
    found = answer.logprobs(ord("a"), Logprobs(-0.5, ((ord("a"), -0.5), (0xC3, -1.0), (5, -float("inf")))))
    assert (found.token, found.bytes, found.logprob) == ("a", (97,), -0.5)
    assert [(top.token, top.bytes, top.logprob) for top in found.top] == [
        ("a", (97,), -0.5),
        ("\ufffd", None, -1.0),
        ("\x05", (5,), -9999.0),
    ]
