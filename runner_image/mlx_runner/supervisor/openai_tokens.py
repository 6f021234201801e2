"""Bodies of `/tokenize` and `/detokenize`; the shapes are vLLM's."""

from typing import Any, Self

from pydantic import Field, StrictBool, model_validator

from mlx_runner import channel

from .json_values import JsonObject
from .openai_chat import Message, Tool, tool_fields
from .openai_parse import Body, Text, TokenId, validated, wrong


class TokenizeRequest(Body):
    """Body of `POST /tokenize`: a `prompt`, or `messages` for the chat template."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    """With `messages`."""
    chat_template_kwargs: JsonObject | None = None
    """With `messages`: variables of the model's chat template."""
    add_generation_prompt: StrictBool = True
    """With `messages`: end with the beginning of an answer."""
    add_special_tokens: StrictBool = True
    """With `prompt`: such as a beginning-of-sequence token."""
    return_token_strs: StrictBool = False
    """Also the text of each token."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "give prompt or messages")
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt"):
            if self.prompt is not None and name in self.model_fields_set:
                raise wrong(name, "only allowed with messages")
        if self.messages is not None and self.add_special_tokens and "add_special_tokens" in self.model_fields_set:
            raise wrong("add_special_tokens", "only allowed with prompt: a chat template writes them itself")
        return self

    def question(self, question_id: str) -> channel.Tokenize:
        """The command for the engine."""
        messages = None if self.messages is None else tuple(message.plain() for message in self.messages)
        return channel.Tokenize(
            id=question_id,
            prompt=self.prompt,
            messages=messages,
            tools=tool_fields(self.tools or (), "auto" if self.tools else "none", parallel=True)["tools"],
            template_options=self.chat_template_kwargs or {},
            add_generation_prompt=self.add_generation_prompt,
            add_special_tokens=self.add_special_tokens,
            return_token_strs=self.return_token_strs,
        )


class DetokenizeRequest(Body):
    """Body of `POST /detokenize`."""

    model: Text | None = None
    tokens: list[TokenId]

    def question(self, question_id: str) -> channel.Detokenize:
        """The command for the engine."""
        return channel.Detokenize(id=question_id, tokens=tuple(self.tokens))


def parse_tokenize(body: Any) -> TokenizeRequest:
    """Validate; raises `ApiError` 400 with the field's name."""
    return validated(TokenizeRequest, body)


def parse_detokenize(body: Any) -> DetokenizeRequest:
    """Validate; raises `ApiError` 400 with the field's name."""
    return validated(DetokenizeRequest, body)


def tokenized(answer: channel.Tokenized) -> dict[str, Any]:
    """The JSON."""
    strings = None if answer.token_strs is None else list(answer.token_strs)
    counts = {"count": len(answer.tokens), "max_model_len": answer.max_model_len}
    return {**counts, "tokens": list(answer.tokens), "token_strs": strings}
