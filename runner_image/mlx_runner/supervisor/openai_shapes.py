"""The JSON of OpenAI's answers."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_runner import channel

from .openai_errors import ApiError

Json = dict[str, Any]


@dataclass(slots=True)
class Row:
    """One choice, as far as it is known."""

    text: str = ""
    reasoning: str = ""
    calls: list[channel.ToolCall] = field(default_factory=list)
    logprobs: list[channel.TokenLogprobs] = field(default_factory=list)
    finished: channel.Finished | None = None

    def add(self, delta: channel.Delta) -> None:
        """What came."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.calls += delta.tool_calls
        self.logprobs += delta.logprobs

    @property
    def finish_reason(self) -> str:
        """Why it ended."""
        return self.finished.finish_reason if self.finished else "stop"


@dataclass(slots=True)
class Form:
    """What of a request decides how its answer is dressed."""

    model: str
    prompts: int = 1
    """Different prompts among the choices: each counts once in the usage."""
    n: int = 1
    """Choices to each prompt."""
    usage: bool = False
    """A stream ends with the usage."""
    logprobs: bool = False

    @property
    def choices(self) -> int:
        """All choices."""
        return self.prompts * self.n


class Shape(Protocol):
    """How one endpoint dresses an answer. Everything that is said must pass through `chunk` or `rows`, in order."""

    id: str
    rows: list[Row]
    done: bytes
    """What a stream ends with."""

    def whole(self) -> Json:
        """The answer in one piece, when all rows are finished."""

    def opening(self) -> list[Json]:
        """Chunks before the first text."""

    def chunk(self, number: int, delta: channel.Delta) -> list[Json]:
        """Chunks of what came to a row."""

    def closing(self, number: int) -> list[Json]:
        """Chunks after the last text of a row, which is finished."""

    def ending(self) -> list[Json]:
        """Chunks when all rows are finished."""

    def broken(self, error: ApiError) -> Json:
        """The chunk that says why the stream breaks off."""


class Base:
    """What chat and completions share. With `usage`, every chunk carries the key, and the last one the counts."""

    done = b"data: [DONE]\n\n"

    def __init__(self, form: Form, prefix: str, kind: str, chunk_kind: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.rows = [Row() for _ in range(form.choices)]
        self._form = form
        self._kind = kind
        self._chunk_kind = chunk_kind
        self._created = int(time.time())

    def _head(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._form.model, "choices": choices}

    def _piece(self, number: int, choice: Json, *, finish: str | None = None, logprobs: Json | None = None) -> Json:
        choice = {"index": number, **choice, "finish_reason": finish, "logprobs": logprobs}
        return {**self._head(self._chunk_kind, [choice]), **({"usage": None} if self._form.usage else {})}

    def _choice(self, number: int, row: Row) -> Json:
        raise NotImplementedError

    def whole(self) -> Json:
        """The answer in one piece."""
        choices = [
            {"index": number, **self._choice(number, row), "finish_reason": row.finish_reason}
            for number, row in enumerate(self.rows)
        ]
        return {**self._head(self._kind, choices), "usage": usage(self.rows, self._form.n)}

    def ending(self) -> list[Json]:
        """The counts."""
        return (
            [{**self._head(self._chunk_kind, []), "usage": usage(self.rows, self._form.n)}] if self._form.usage else []
        )

    def broken(self, error: ApiError) -> Json:
        """The error."""
        return error.body()


class Chat(Base):
    """Chat completions."""

    def __init__(self, form: Form) -> None:
        super().__init__(form, "chatcmpl", "chat.completion", "chat.completion.chunk")

    def _choice(self, number: int, row: Row) -> Json:
        message: Json = {"role": "assistant", "content": row.text, "refusal": None}
        if row.reasoning:
            message["reasoning_content"] = row.reasoning
        if row.calls:
            message["tool_calls"] = [_call(call) for call in row.calls]
            message["content"] = row.text or None
        return {"message": message, "logprobs": self._logprobs(row.logprobs)}

    def opening(self) -> list[Json]:
        """The role comes first."""
        return [
            self._piece(number, {"delta": {"role": "assistant", "content": ""}}) for number in range(len(self.rows))
        ]

    def chunk(self, number: int, delta: channel.Delta) -> list[Json]:
        """Text, reasoning, calls: a chunk for each."""
        self.rows[number].add(delta)
        told: list[Json] = []
        if delta.reasoning:
            told.append({"reasoning_content": delta.reasoning})
        if delta.text or (delta.logprobs and not delta.reasoning):
            told.append({"content": delta.text})
        told += [{"tool_calls": [{"index": call.index, **_call(call)}]} for call in delta.tool_calls]
        logprobs = [self._logprobs(list(delta.logprobs)), *[None] * len(told)] if delta.logprobs else [None] * len(told)
        return [self._piece(number, {"delta": one}, logprobs=logprobs[at]) for at, one in enumerate(told)]

    def closing(self, number: int) -> list[Json]:
        """Why it ended."""
        return [self._piece(number, {"delta": {}}, finish=self.rows[number].finish_reason)]

    def _logprobs(self, found: list[channel.TokenLogprobs]) -> Json | None:
        if not self._form.logprobs:
            return None
        content = [{**_likelihood(one), "top_logprobs": [_likelihood(top) for top in one.top]} for one in found]
        return {"content": content, "refusal": None}


class Completion(Base):
    """Completions."""

    def __init__(self, form: Form) -> None:
        super().__init__(form, "cmpl", "text_completion", "text_completion")
        self._offsets = [0] * form.choices

    def _choice(self, number: int, row: Row) -> Json:
        return {"text": row.text, "logprobs": self._logprobs(number, row.logprobs)}

    def opening(self) -> list[Json]:
        """Nothing comes before the text."""
        return []

    def chunk(self, number: int, delta: channel.Delta) -> list[Json]:
        """A piece of text."""
        self.rows[number].add(delta)
        if not (delta.text or delta.logprobs):
            return []
        return [self._piece(number, {"text": delta.text}, logprobs=self._logprobs(number, list(delta.logprobs)))]

    def closing(self, number: int) -> list[Json]:
        """Why it ended."""
        return [self._piece(number, {"text": ""}, finish=self.rows[number].finish_reason)]

    def _logprobs(self, number: int, found: list[channel.TokenLogprobs]) -> Json | None:
        """Lists side by side, of the tokens since the last call."""
        if not self._form.logprobs:
            return None
        offsets = []
        for one in found:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(one.token)
        return {
            "tokens": [one.token for one in found],
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{top.token: top.logprob for top in one.top} for one in found],
            "text_offset": offsets,
        }


def usage(rows: list[Row], n: int) -> Json:
    """The counts of an answer: each prompt once, also where it has `n` choices."""
    finished = [row.finished for row in rows if row.finished is not None]
    prompt = sum(one.prompt_tokens for one in finished[::n])
    completion = sum(one.completion_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in finished[::n])},
        "completion_tokens_details": {"reasoning_tokens": sum(one.reasoning_tokens for one in finished)},
    }


def _call(call: channel.ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _likelihood(one: channel.Likelihood) -> Json:
    return {"token": one.token, "logprob": one.logprob, "bytes": None if one.bytes is None else list(one.bytes)}
