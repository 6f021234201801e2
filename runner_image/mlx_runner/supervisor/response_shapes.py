"""The JSON of `/v1/responses`, and its events in the order that OpenAI's clients expect."""

import time
import uuid
from typing import Any

from mlx_runner import channel

from .openai_errors import ApiError
from .openai_responses import ResponsesRequest
from .openai_shapes import Json, Row
from .response_items import Item, ItemRow

_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}


class Response:
    """One response: reasoning and messages are its items; a `Shape`."""

    done = b""

    def __init__(self, asked: ResponsesRequest) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._row = ItemRow(key=self.id.removeprefix("resp_"))
        self.rows: list[Row] = [self._row]
        self._asked = asked
        self._created = int(time.time())
        self._sequence = 0
        self._open: Item | None = None

    # -- the whole
    def whole(self) -> Json:
        """The answer in one piece."""
        self._row.end()
        cut = self._row.finish_reason == "length"
        output = [item.json() for item in self._row.items]
        return self._response("incomplete" if cut else "completed", output, self._row.finished)

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

    # -- as a stream
    def opening(self) -> list[Json]:
        """The response exists."""
        return [self._event(f"response.{kind}", response=self._response("in_progress", [])) for kind in _BEGINNINGS]

    def chunk(self, number: int, delta: channel.Delta) -> list[Json]:
        """Reasoning and text, each in an item of its own."""
        return self._tell(self._row.take(delta))

    def closing(self, number: int) -> list[Json]:
        """The end of the last item."""
        return [*self._tell(self._row.end()), *self._close()]

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

    def _tell(self, pieces: list[tuple[Item, str]]) -> list[Json]:
        """Text of items; where one begins, the one before it ends."""
        events: list[Json] = []
        for item, text in pieces:
            if item is not self._open:
                events += [*self._close(), *self._begin(item)]
            if text:
                events.append(self._part_event(item, f"{_PARTS[item.kind]}.delta", delta=text))
        return events

    def _begin(self, item: Item) -> list[Json]:
        self._open = item
        begun = Item(item.kind, item.id, item.number)
        return [
            self._event("response.output_item.added", output_index=item.number, item=begun.json()),
            self._part_event(item, "content_part.added", part=item.part("")),
        ]

    def _close(self) -> list[Json]:
        if (item := self._open) is None:
            return []
        self._open = None
        return [
            self._part_event(item, f"{_PARTS[item.kind]}.done", text=item.text),
            self._part_event(item, "content_part.done", part=item.part(item.text)),
            self._event("response.output_item.done", output_index=item.number, item=item.json()),
        ]

    def _part_event(self, item: Item, kind: str, **fields: Any) -> Json:
        extra: Json = {"logprobs": []} if kind.startswith("output_text") else {}
        where = {"item_id": item.id, "output_index": item.number, "content_index": 0}
        return self._event(f"response.{kind}", **where, **extra, **fields)


_BEGINNINGS = ("created", "in_progress")


def _usage(finished: channel.Finished) -> Json:
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": finished.cached_tokens},
        "output_tokens": finished.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": finished.reasoning_tokens},
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
