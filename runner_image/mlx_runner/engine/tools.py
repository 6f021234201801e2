"""Tool calls: mlx-lm's parsers read them, a grammar forces them where the model's way to write them allows it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_runner.channel import ToolCall

from .grammar import Grammars
from .schemas import moved
from .text import ToolFormat

Tool = Mapping[str, Any]
_PARSER_ERRORS = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, SyntaxError),
    *(ArithmeticError, RecursionError, MemoryError),
)
"""What mlx-lm's parsers, and `json`, raise for a text that is no call: Python's own parser runs out of memory for one
that is nested too deep."""


def parse(form: ToolFormat, text: str, tools: Sequence[Tool], request: str, first: int) -> tuple[ToolCall, ...]:
    """The calls in a text between markers; none when it is no call. `first`: calls of this answer so far.

    Ids depend on nothing but the request and the call's number: a request that is resumed gives them again.
    """
    try:
        parsed = form.parse(text, [dict(tool) for tool in tools])
        found = parsed if isinstance(parsed, list) else [parsed]
        return tuple(_read(call, request, first + number) for number, call in enumerate(found))
    except _PARSER_ERRORS:
        return ()


def _read(call: Any, request: str, index: int) -> ToolCall:
    """What a parser found. It raises one of `_PARSER_ERRORS` where no client could be told of it in JSON."""
    name, arguments = call["name"], _arguments(call.get("arguments", {}))
    (name + arguments).encode()  # half a surrogate pair, for one
    return ToolCall(index=index, id=_id(request, index), name=name, arguments=arguments)


def _arguments(arguments: Any) -> str:
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    json.loads(arguments, parse_constant=_no_number)
    return arguments


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _id(request: str, index: int) -> str:
    return "call_" + hashlib.sha256(f"{request}/{index}".encode()).hexdigest()[:24]


# -- forced calls
_Writer = Callable[[str, str, dict[str, Any], bool], str]


def _json_tools(start: str, end: str, call: dict[str, Any], many: bool) -> str:
    """`<tool_call>{"name": …, "arguments": …}</tool_call>`, a pair of markers for each call."""
    calls = r'call ("\n" call)*' if many else "call"
    return f'start: {calls}\ncall: {start} "\\n" body "\\n" {end}\nbody: %json {_json(call)}\n'


def _mistral(start: str, _: str, call: dict[str, Any], many: bool) -> str:
    """`[TOOL_CALLS][{"name": …, "arguments": …}, …]`: a list up to the end of the answer."""
    calls = {"type": "array", "items": call, "minItems": 1, **({} if many else {"maxItems": 1})}
    return f"start: {start} body\nbody: %json {_json(calls)}\n"


_WRITERS: Mapping[str, tuple[_Writer, str]] = {"json_tools": (_json_tools, "#"), "mistral": (_mistral, "#/items")}
"""By the name of mlx-lm's parser, with the place of a call in the schema. The others write no JSON that a schema could
describe."""


def forcible(form: ToolFormat) -> bool:
    """Whether a grammar can make the model call a tool."""
    return form.name in _WRITERS


def forced(grammars: Grammars, form: ToolFormat, tools: Sequence[Tool], *, many: bool, token_of: Any) -> str:
    """The grammar of an answer that is nothing but calls of these tools, in Lark.

    Raises:
        GrammarError: the model's tokenizer is none that structured output works with.
    """
    start, end = (grammars.literal(marker, token_of(marker)) for marker in (form.start, form.end))
    write, place = _WRITERS[form.name]
    functions = [tool["function"] for tool in tools]
    if len(functions) == 1:
        return write(start, end, _call(functions[0], place), many)
    calls = [_call(function, f"{place}/anyOf/{number}") for number, function in enumerate(functions)]
    return write(start, end, {"anyOf": calls}, many)


def _call(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": moved(parameters, f"{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_flexible": False}})
