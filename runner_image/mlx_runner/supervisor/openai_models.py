"""What clients may ask: OpenAI's request bodies, validated; what is not supported is refused by name."""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field, StrictBool, StrictInt, StrictStr

from mlx_runner import channel

from .openai_errors import invalid
from .openai_parse import Body, Strict, Text, TokenId, validated
from .openai_shapes import Form

MAX_STOPS = 4
MAX_CHOICES = 128
MAX_LOGPROBS = 20
_SEED_RANGE = 1 << 32
"""Sampling keys are 32 bits wide."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Count = Annotated[StrictInt, Field(ge=1, lt=1 << 31)]
Bias = dict[Annotated[StrictStr, Field(pattern=r"^\d{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]]


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: StrictBool = False
    """End with a chunk that holds the usage."""
    include_obfuscation: StrictBool = False
    """Accepted; nothing is obfuscated."""


class Sampled(Body):
    """What every endpoint that generates shares."""

    model: Text
    """The served model's name."""
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    """0: the most likely token. Default: 1."""
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Share of probability that is drawn from. Default: 1."""
    top_k: Annotated[StrictInt, Field(ge=-1, lt=1 << 31)] | None = None
    """As many tokens are drawn from; 0 and -1: all."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Least probability of a token, as a share of the most likely one's. Default: 0."""
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    """The same seed and request give the same answer, alone and among others. Default: random."""
    presence_penalty: Penalty | None = None
    """Subtracted from the logit of each token that the answer holds."""
    frequency_penalty: Penalty | None = None
    """Subtracted once for each time that the answer holds the token."""
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    """Divides positive and multiplies negative logits of tokens of prompt and answer. Default: 1."""
    logit_bias: Bias | None = None
    """Added to logits, by token id."""
    stream: StrictBool | None = None
    """Server-sent events."""

    def sampling(self) -> dict[str, Any]:
        """Fields of `channel.Generate`."""
        seed = secrets.randbelow(_SEED_RANGE) if self.seed is None else self.seed % _SEED_RANGE
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": max(0, self.top_k or 0),
            "min_p": self.min_p or 0.0,
            "seed": seed,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "logit_bias": tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        }


class Choices(Sampled):
    """What chat and completions share."""

    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Answers to each prompt; the first has `seed`, the next `seed` + 1. Default: 1."""
    max_tokens: Count | None = None
    """Default: what fits into the context."""
    stop: Text | list[Text] | None = None
    """Up to 4 texts that end the answer."""
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
        """Fields of `channel.Generate`."""
        return {**super().sampling(), "max_tokens": self.limit(), "stop": self.stops()}

    def form(self) -> Form:
        """How the answer is dressed."""
        return Form(self.model, n=self.n or 1, usage=self.include_usage())


def rows(
    request_id: str, prompts: list[dict[str, Any]], n: int, shared: dict[str, Any]
) -> tuple[channel.Generate, ...]:
    """Commands for the engine, one for each choice: `n` for the first prompt, then `n` for the next.

    Choices are requests of their own to the engine: each is sampled, cancelled and resumed by itself.
    """
    single = len(prompts) * n == 1
    return tuple(
        channel.Generate(
            id=request_id if single else f"{request_id}-{number * n + choice}",
            **prompt,
            **{**shared, "seed": (shared["seed"] + choice) % _SEED_RANGE},
        )
        for number, prompt in enumerate(prompts)
        for choice in range(n)
    )


class CompletionRequest(Choices):
    """Body of `POST /v1/completions`."""

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}

    prompt: Text | list[TokenId] | list[Text]
    """A text, several texts, or one prompt as token ids."""
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report each token's logprob and as many alternatives."""

    def rows(self, request_id: str) -> tuple[channel.Generate, ...]:
        """Commands for the engine."""
        shared = {**self.sampling(), "logprobs": self.logprobs}
        prompts = [{"prompt": prompt} for prompt in self._prompts()]
        return rows(request_id, prompts, self.n or 1, shared)

    def form(self) -> Form:
        """How the answer is dressed."""
        return replace(super().form(), prompts=len(self._prompts()), logprobs=self.logprobs is not None)

    def _prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise invalid("prompt", "must not be empty")
        numbers = tuple(item for item in self.prompt if isinstance(item, int))
        if numbers:
            return [numbers]
        if len(self.prompt) > MAX_CHOICES:
            raise invalid("prompt", f"{len(self.prompt)} texts are too many for one request: at most {MAX_CHOICES}")
        return [item for item in self.prompt if isinstance(item, str)]


def parse_completion(body: Any) -> CompletionRequest:
    """Validate a completion request; raises `ApiError` 400 with the field's name."""
    return validated(CompletionRequest, body)
