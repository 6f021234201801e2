"""The items of a response, in the order in which they begin: the same for an answer told whole and as a stream."""

from dataclasses import dataclass, field
from typing import Literal

from mlx_runner import channel

from .openai_shapes import Json, Row

Kind = Literal["reasoning", "message"]


@dataclass(slots=True)
class Item:
    """Reasoning, or a message."""

    kind: Kind
    id: str
    number: int
    text: str = ""
    status: str = "in_progress"

    def json(self) -> Json:
        """As a client gets it; what has just begun has no content."""
        extra: Json = {"summary": []} if self.kind == "reasoning" else {"role": "assistant"}
        content = [] if self.status == "in_progress" else [self.part(self.text)]
        return {"id": self.id, "type": self.kind, "status": self.status, **extra, "content": content}

    def part(self, text: str) -> Json:
        """Its one part."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


@dataclass(slots=True)
class ItemRow(Row):
    """The answer of a response. `key`: what the ids of its items have in common."""

    key: str = ""
    items: list[Item] = field(default_factory=list)
    _held: str = ""
    """White space before a message: many models write some before they think, and reasoning comes first."""

    def add(self, delta: channel.Delta) -> None:
        """What came."""
        self.take(delta)

    def take(self, delta: channel.Delta) -> list[tuple[Item, str]]:
        """What came, with the items that it belongs to."""
        Row.add(self, delta)
        pieces = []
        if delta.reasoning:
            pieces.append(self._give("reasoning", delta.reasoning))
        self._held += delta.text
        if self._held.strip() or (self._held and self._last == "message"):
            pieces.append(self._give("message", self._held))
            self._held = ""
        return pieces

    def end(self) -> list[tuple[Item, str]]:
        """The answer is finished; its last item is a message, also where that is empty."""
        pieces = []
        if self._last != "message":
            pieces.append(self._give("message", self._held))
            self._held = ""
        self._close()
        return pieces

    @property
    def _last(self) -> Kind | None:
        return self.items[-1].kind if self.items else None

    def _give(self, kind: Kind, text: str) -> tuple[Item, str]:
        if self._last != kind:
            self._close()
            prefix = "rs" if kind == "reasoning" else "msg"
            number = len(self.items)
            self.items.append(Item(kind, f"{prefix}_{self.key}_{number}", number))
        self.items[-1].text += text
        return self.items[-1], text

    def _close(self) -> None:
        if self.items and self.items[-1].status == "in_progress":
            self.items[-1].status = "incomplete" if self.finish_reason == "length" else "completed"
