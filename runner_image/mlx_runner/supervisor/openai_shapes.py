"""The JSON of OpenAI's answers."""

import time
import uuid
from typing import Any, Protocol

from mlx_runner import channel


class Shape(Protocol):
    """How one endpoint dresses text. With `usage`, every chunk of a stream carries the key, the last one the counts."""

    id: str

    def whole(self, text: str, finished: channel.Finished) -> dict[str, Any]:
        """The answer in one piece."""

    def opening(self, usage: bool) -> list[dict[str, Any]]:
        """Chunks before the first text."""

    def chunk(self, text: str, usage: bool) -> dict[str, Any]:
        """A piece of text."""

    def closing(self, finished: channel.Finished, usage: bool) -> list[dict[str, Any]]:
        """Chunks after the last text."""


class _Base:
    def __init__(self, model: str, prefix: str, kind: str, chunk_kind: str) -> None:
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self._model = model
        self._kind = kind
        self._chunk_kind = chunk_kind
        self._created = int(time.time())

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _piece(self, choice: dict[str, Any], usage: bool) -> dict[str, Any]:
        choice = {"index": 0, **choice, "logprobs": None}
        return {**self._head(self._chunk_kind, [choice]), **({"usage": None} if usage else {})}

    def _counts(self, finished: channel.Finished) -> list[dict[str, Any]]:
        return [{**self._head(self._chunk_kind, []), "usage": _usage(finished)}]


class Chat(_Base):
    """Chat completions."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "chatcmpl", "chat.completion", "chat.completion.chunk")

    def whole(self, text: str, finished: channel.Finished) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finished.finish_reason, "logprobs": None}
        return {**self._head(self._kind, [choice]), "usage": _usage(finished)}

    def opening(self, usage: bool) -> list[dict[str, Any]]:
        """The role comes first."""
        return [self._piece({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, usage)]

    def chunk(self, text: str, usage: bool) -> dict[str, Any]:
        """A piece of text."""
        return self._piece({"delta": {"content": text}, "finish_reason": None}, usage)

    def closing(self, finished: channel.Finished, usage: bool) -> list[dict[str, Any]]:
        """Why it ended, then the counts."""
        last = self._piece({"delta": {}, "finish_reason": finished.finish_reason}, usage)
        return [last, *(self._counts(finished) if usage else [])]


class Completion(_Base):
    """Completions."""

    def __init__(self, model: str) -> None:
        super().__init__(model, "cmpl", "text_completion", "text_completion")

    def whole(self, text: str, finished: channel.Finished) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {"index": 0, "text": text, "finish_reason": finished.finish_reason, "logprobs": None}
        return {**self._head(self._kind, [choice]), "usage": _usage(finished)}

    def opening(self, usage: bool) -> list[dict[str, Any]]:
        """Nothing comes before the text."""
        return []

    def chunk(self, text: str, usage: bool) -> dict[str, Any]:
        """A piece of text."""
        return self._piece({"text": text, "finish_reason": None}, usage)

    def closing(self, finished: channel.Finished, usage: bool) -> list[dict[str, Any]]:
        """Why it ended, then the counts."""
        last = self._piece({"text": "", "finish_reason": finished.finish_reason}, usage)
        return [last, *(self._counts(finished) if usage else [])]


def _usage(finished: channel.Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }
