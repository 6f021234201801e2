"""What clients may ask: OpenAI's request bodies, validated; what we cannot do yet is refused by name."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from mlx_runner import channel

from .openai_errors import ApiError, invalid, unsupported

MAX_STOPS = 4
_SEED_RANGE = 1 << 32
"""Sampling keys are 32 bits wide."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not supported, with the values that ask for nothing and so may pass (null always may)."""
_HARMLESS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
)
"""Fields that are about the caller's bookkeeping and change no answer."""


def _encodable(text: str) -> str:
    """JSON may hold half a surrogate pair; no encoding of text can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no valid Unicode: half a surrogate pair at character {error.start}") from error
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class _Request(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="forbid")

    model: Text
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: Text | list[Text] | None = None
    seed: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop sequences."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MAX_STOPS:
            raise invalid("stop", f"{len(given)} stop sequences are too many: at most {MAX_STOPS}")
        if "" in given:
            raise invalid("stop", "a stop sequence must not be empty")
        return tuple(given)

    def limit(self) -> int | None:
        """The most tokens to generate."""
        return self.max_tokens

    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "only allowed with stream=true")
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """The fields of `channel.Generate` that both endpoints fill in."""
        seed = secrets.randbelow(_SEED_RANGE) if self.seed is None else self.seed % _SEED_RANGE
        return {
            "max_tokens": self.limit(),
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "stop": self.stops(),
            "seed": seed,
        }


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: list[Any] | None = None

    def plain(self) -> dict[str, Any]:
        """For the chat template: a string as content. Templates know `system`, OpenAI's newer name is `developer`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None

    def limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise invalid("max_tokens", "give max_tokens or max_completion_tokens, not both")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def generate(self, request_id: str) -> channel.Generate:
        """The command for the engine."""
        messages = tuple(message.plain() for message in self.messages)
        return channel.Generate(id=request_id, messages=messages, **self.sampling())


class CompletionRequest(_Request):
    """Body of `POST /v1/completions`."""

    prompt: Text | list[TokenId] | list[Text]

    def generate(self, request_id: str) -> channel.Generate:
        """The command for the engine."""
        return channel.Generate(id=request_id, prompt=self._prompt(), **self.sampling())

    def _prompt(self) -> str | tuple[int, ...]:
        if isinstance(self.prompt, str):
            return self.prompt
        if not self.prompt:
            raise invalid("prompt", "must not be empty")
        numbers = tuple(item for item in self.prompt if isinstance(item, int))
        if numbers:
            return numbers
        texts = [item for item in self.prompt if isinstance(item, str)]
        if len(texts) > 1:
            raise unsupported("prompt", f"list of {len(texts)} texts", "send one request for each prompt")
        return texts[0]


def parse_chat(body: Any) -> ChatRequest:
    """Validate a chat request; raises `ApiError` 400 with the field's name."""
    try:
        return ChatRequest.model_validate(_supported(body))
    except ValidationError as error:
        raise _api_error(error) from error


def parse_completion(body: Any) -> CompletionRequest:
    """Validate a completion request; raises `ApiError` 400 with the field's name."""
    try:
        return CompletionRequest.model_validate(_supported(body))
    except ValidationError as error:
        raise _api_error(error) from error


def _supported(body: Any) -> dict[str, Any]:
    """The body without fields that ask for nothing."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_value")
    kept = {}
    for name, value in body.items():
        if name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            kept[name] = value
        elif value is not None and not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise unsupported(name, value, "leave the field out")
    return kept


def _same(value: object, neutral: object) -> bool:
    """Equal, and no boolean for a number: `n=true` is not `n=1`."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _api_error(error: ValidationError) -> ApiError:
    # Of a union every branch complains; the deepest complaint is about the branch that was meant.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    # A union's branches are parts of the location; a client knows only the names and indices it sent.
    parts = [p for p in first["loc"] if isinstance(p, int) or (p.isidentifier() and not _branch(p))]
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip(".") or "body"
    match first["type"]:
        case "extra_forbidden":
            return ApiError(400, f"unrecognized request argument: {where}", code="unknown_parameter", param=where)
        case "missing":
            return ApiError(400, f"missing required parameter: {where}", code="missing_required_parameter", param=where)
        case "none_required":
            return unsupported(where, first["input"], "leave the field out")
        case _:
            return invalid(where, f"{first['msg']}, not {first['input']!r}"[:300])


def _branch(part: str) -> bool:
    return part in {"str", "int", "float", "list", "constrained"}
