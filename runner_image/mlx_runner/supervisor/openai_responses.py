"""The body of `POST /v1/responses`: text in, text out, nothing stored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StrictBool, model_validator

from mlx_runner import channel

from .json_values import JsonObject
from .openai_chat import Effort
from .openai_models import Count, Sampled
from .openai_parse import HARMLESS, Strict, Text, validated, wrong


class ResponsePart(Strict):
    """A part of an item's content; also of an answer that is sent back."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[ResponsePart]
    id: Text | None = None
    status: Text | None = None
    phase: None = None

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None
    """The schema is followed either way."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and self.schema_ is None:
            raise wrong("schema", "", "missing_required_parameter")
        return self

    def asked(self) -> dict[str, Any] | None:
        """The schema of the answer; None for any text."""
        match self.type:
            case "json_object":
                return {"type": "object"}
            case "json_schema":
                return self.schema_
            case "text":
                return None


class TextOptions(Strict):
    """`text`."""

    format: TextFormat | None = None
    verbosity: None = None


class Reasoning(Strict):
    """`reasoning`."""

    effort: Effort | None = None
    """For chat templates that know it."""
    summary: None = None
    generate_summary: None = None


class ResponseStreamOptions(Strict):
    """`stream_options`."""

    include_obfuscation: StrictBool = False
    """Accepted; nothing is obfuscated."""


class ResponsesRequest(Sampled):
    """Body of `POST /v1/responses`."""

    HARMLESS: ClassVar[frozenset[str]] = HARMLESS - {"store"} | {"parallel_tool_calls"}
    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "include": ([],),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Text | Annotated[list[InputMessage], Field(min_length=1)]
    """A text of the user, or messages."""
    instructions: Text | None = None
    """A system message before the input."""
    max_output_tokens: Count | None = None
    """Default: what fits into the context."""
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream_options: ResponseStreamOptions | None = None

    def rows(self, request_id: str) -> tuple[channel.Generate, ...]:
        """The command for the engine."""
        given = self.input
        messages = [{"role": "user", "content": given}] if isinstance(given, str) else [one.plain() for one in given]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return (
            channel.Generate(
                id=request_id,
                messages=tuple(messages),
                max_tokens=self.max_output_tokens,
                json_schema=self.text.format.asked() if self.text and self.text.format else None,
                reasoning_effort=self.reasoning.effort if self.reasoning else None,
                **self.sampling(),
            ),
        )


def parse_responses(body: Any) -> ResponsesRequest:
    """Validate; raises `ApiError` 400 with the field's name."""
    return validated(ResponsesRequest, body)
