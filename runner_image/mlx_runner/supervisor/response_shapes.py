"""The JSON of `/v1/responses`, and its events in the order that OpenAI's clients expect."""

import time
import uuid
from typing import Any

from mlx_runner import channel

from .openai_errors import ApiError
from .openai_responses import ResponsesRequest
from .openai_shapes import Json, Row

_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}


class Response:
    """One response: reasoning and a message are its items; a `Shape`."""

    done = b""

    def __init__(self, asked: ResponsesRequest) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.rows = [Row()]
        self._asked = asked
        self._created = int(time.time())
        self._sequence = 0
        self._open: str | None = None
        self._count = 0

    # -- the whole
    def whole(self) -> Json:
        """The answer in one piece."""
        row = self.rows[0]
        cut = row.finish_reason == "length"
        return self._response("incomplete" if cut else "completed", self._items(row), row.finished)

    def _response(self, status: str, output: list[Json], finished: channel.Finished | None = None) -> Json:
        asked = self._asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": self._format()},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None if finished is None else _usage(finished),
        }

    def _format(self) -> Json:
        form = self._asked.text.format if self._asked.text else None
        return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)

    def _items(self, row: Row) -> list[Json]:
        texts = [("reasoning", row.reasoning), ("message", row.text)]
        status = "incomplete" if row.finish_reason == "length" else "completed"
        kept = [(kind, text) for kind, text in texts if text or kind == "message"]
        return [self._item(kind, number, status, [_part(kind, text)]) for number, (kind, text) in enumerate(kept)]

    def _item(self, kind: str, number: int, status: str, content: list[Json]) -> Json:
        prefix = "rs" if kind == "reasoning" else "msg"
        extra: Json = {"summary": []} if kind == "reasoning" else {"role": "assistant"}
        item_id = f"{prefix}_{self.id.removeprefix('resp_')}_{number}"
        return {"id": item_id, "type": kind, "status": status, **extra, "content": content}

    # -- as a stream
    def opening(self) -> list[Json]:
        """The response exists."""
        return [self._event(f"response.{kind}", response=self._response("in_progress", [])) for kind in _BEGINNINGS]

    def chunk(self, number: int, delta: channel.Delta) -> list[Json]:
        """Reasoning and text, each in an item of its own."""
        self.rows[number].add(delta)
        events: list[Json] = []
        for kind, text in (("reasoning", delta.reasoning), ("message", delta.text)):
            if text and not (kind == "reasoning" and self._open == "message"):
                events += self._ensure(kind)
                events.append(self._part_event(f"{_PARTS[kind]}.delta", kind, delta=text))
        return events

    def closing(self, number: int) -> list[Json]:
        """The end of the message; there is one, also where it is empty."""
        return [*self._ensure("message"), *self._close()]

    def ending(self) -> list[Json]:
        """The whole response once more."""
        response = self.whole()
        return [self._event(f"response.{response['status']}", response=response)]

    def broken(self, error: ApiError) -> Json:
        """The error."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _event(self, kind: str, **fields: Any) -> Json:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _part_event(self, kind: str, item: str, **fields: Any) -> Json:
        number = self._count - 1
        item_id = self._item(item, number, "", [])["id"]
        extra: Json = {"logprobs": []} if kind.startswith("output_text") else {}
        where = {"item_id": item_id, "output_index": number, "content_index": 0}
        return self._event(f"response.{kind}", **where, **extra, **fields)

    def _ensure(self, kind: str) -> list[Json]:
        """Begin an item where it is not open; the one before it ends."""
        if self._open == kind:
            return []
        events = self._close()
        self._open, self._count = kind, self._count + 1
        item = self._item(kind, self._count - 1, "in_progress", [])
        return [
            *events,
            self._event("response.output_item.added", output_index=self._count - 1, item=item),
            self._part_event("content_part.added", kind, part=_part(kind, "")),
        ]

    def _close(self) -> list[Json]:
        if self._open is None:
            return []
        kind, number, row = self._open, self._count - 1, self.rows[0]
        self._open = None
        text = row.reasoning if kind == "reasoning" else row.text
        status = "incomplete" if kind == "message" and row.finish_reason == "length" else "completed"
        item = self._item(kind, number, status, [_part(kind, text)])
        return [
            self._part_event(f"{_PARTS[kind]}.done", kind, text=text),
            self._part_event("content_part.done", kind, part=_part(kind, text)),
            self._event("response.output_item.done", output_index=number, item=item),
        ]


_BEGINNINGS = ("created", "in_progress")


def _part(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(finished: channel.Finished) -> Json:
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.cached_tokens},
        "output_tokens": finished.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": finished.reasoning_tokens},
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
