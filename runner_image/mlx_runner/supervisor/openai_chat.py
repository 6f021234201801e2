"""The body of a chat request: messages, tools, response format."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StrictBool, StrictInt, model_validator

from mlx_runner import channel

from . import json_values
from .json_values import JsonObject
from .openai_errors import invalid
from .openai_models import MAX_LOGPROBS, Choices, Count, rows
from .openai_parse import Strict, Text, validated, wrong
from .openai_shapes import Form

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
FunctionName = Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
MAX_TOOLS = 128


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class CalledFunction(Strict):
    """What a tool call calls."""

    name: Text
    arguments: Text
    """JSON."""


class MessageToolCall(Strict):
    """A call that the assistant made earlier."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
    index: StrictInt | None = None

    def plain(self) -> dict[str, Any]:
        """For the chat template, which takes arguments as an object."""
        arguments = json_values.read(self.function.arguments or "{}")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            arguments = json_values.sayable(json_values.read(self.function.arguments or "{}"))
        except ValueError as error:
            raise wrong("function.arguments", f"no JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise wrong("function.arguments", "must be a JSON object")
        return self


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None
    """May be left out beside `tool_calls` only."""
    name: Text | None = None
    reasoning_content: Text | None = None
    """Of an assistant, for templates that take it."""
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: Text | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, data: Any) -> Any:
        calls = isinstance(data, dict) and data.get("role") == "assistant" and data.get("tool_calls")
        return {"content": None, **data} if calls else data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise wrong("tool_calls", "only an assistant's message has them")
        if self.reasoning_content is not None and self.role != "assistant":
            raise wrong("reasoning_content", "only an assistant's message has it")
        if self.content is None and not self.tool_calls:
            raise wrong("content", "must be a text")
        if self.role == "tool" and self.tool_call_id is None:
            raise wrong("tool_call_id", "", "missing_required_parameter")
        return self

    def plain(self) -> dict[str, Any]:
        """For the chat template: a string as content. Templates know `system`, OpenAI's newer name is `developer`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        plain: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.reasoning_content is not None:
            plain["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            plain["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            plain["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            plain["name"] = self.name
        return plain


class Function(Strict):
    """What a tool is."""

    name: FunctionName
    description: Text | None = None
    parameters: JsonObject | None = None
    """A JSON schema."""
    strict: StrictBool | None = None
    """With `tool_choice` `required` or a name the schema is always followed; with `auto` it is the model's to do so."""


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a tool."""

    name: Text


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema with its name."""

    name: Text | None = None
    description: Text | None = None
    schema_: JsonObject = Field(default_factory=dict, alias="schema")
    strict: StrictBool | None = None
    """The schema is followed either way."""


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.json_schema is None) == (self.type == "json_schema"):
            missing = self.type == "json_schema"
            raise wrong(
                "json_schema",
                "only with type json_schema",
                "missing_required_parameter" if missing else "invalid_value",
            )
        return self

    def asked(self) -> dict[str, Any] | None:
        """The schema of the answer; None for any text."""
        if self.type == "json_object":
            return {"type": "object"}
        return None if self.json_schema is None else self.json_schema.schema_


class ChatRequest(Choices):
    """Body of `POST /v1/chat/completions`."""

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    """The newer name of `max_tokens`."""
    logprobs: StrictBool | None = None
    """Report each token's logprob."""
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """With `logprobs`: alternatives to each token."""
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """Default: `auto`. `none`: the model is not told of the tools. Others are for models that write calls as JSON."""
    parallel_tool_calls: StrictBool | None = None
    """Whether an answer may hold several calls. Default: true."""
    reasoning_effort: Effort | None = None
    """For chat templates that know it; `none` also for those that know `enable_thinking`."""
    chat_template_kwargs: JsonObject | None = None
    """Variables of the model's chat template, such as `enable_thinking`."""

    def limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid("max_tokens", "give max_tokens or max_completion_tokens, not both")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def rows(self, request_id: str) -> tuple[channel.Generate, ...]:
        """Commands for the engine."""
        shared = {
            **self.sampling(),
            **tool_fields(self.tools or (), self.tool_choice, parallel=self.parallel_tool_calls is not False),
            "logprobs": self._logprobs(),
            "json_schema": self.response_format.asked() if self.response_format else None,
            "template_options": self.chat_template_kwargs or {},
            "reasoning_effort": self.reasoning_effort,
        }
        if shared["json_schema"] is not None and shared["tools"]:
            raise invalid("response_format", "not together with tools, unless tool_choice is none")
        messages = tuple(message.plain() for message in self.messages)
        return rows(request_id, [{"messages": messages}], self.n or 1, shared)

    def form(self) -> Form:
        """How the answer is dressed."""
        return replace(super().form(), logprobs=bool(self.logprobs))

    def _logprobs(self) -> int | None:
        if not self.logprobs and self.top_logprobs:
            raise invalid("top_logprobs", "only allowed with logprobs=true")
        return (self.top_logprobs or 0) if self.logprobs else None


def tool_fields(tools: Sequence[Tool], choice: str | NamedTool | None, *, parallel: bool) -> dict[str, Any]:
    """Fields of `channel.Generate`."""
    if choice == "none" or (choice in (None, "auto") and not tools):
        return {"tools": ()}
    name = choice.function.name if isinstance(choice, NamedTool) else None
    if name is not None and all(tool.function.name != name for tool in tools):
        raise invalid("tool_choice", f"there is no tool {name!r} in tools")
    if not tools:
        raise invalid("tool_choice", "only allowed with tools")
    return {
        "tools": tuple(tool.model_dump(exclude_none=True) for tool in tools),
        "tool_choice": "auto" if choice in (None, "auto") else "required",
        "tool_name": name,
        "parallel_tool_calls": parallel,
    }


def parse_chat(body: Any) -> ChatRequest:
    """Validate a chat request; raises `ApiError` 400 with the field's name."""
    return validated(ChatRequest, body)
