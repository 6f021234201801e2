"""The parts of a chat answer: reasoning, tool calls, and the text between them, told apart by the model's markers."""

from dataclasses import dataclass
from enum import Enum

from .text import overlap


class Kind(Enum):
    """What a piece of an answer is."""

    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"
    """All that stands between the markers of a tool call; one piece."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer's text. `closed`: of a call, whether its end marker came."""

    kind: Kind
    text: str
    closed: bool = True


Markers = tuple[str, str]


class Sections:
    """Cuts a growing text; what may be the beginning of a marker is held back.

    White space after a marker is formatting, and left out.
    """

    def __init__(self, thinking: Markers | None, call: Markers | None, *, reasoning: bool = False) -> None:
        self._thinking = thinking
        self._call = call
        self._kind = Kind.REASONING if reasoning else Kind.TEXT
        self._held = ""
        self._fresh = reasoning

    @property
    def kind(self) -> Kind:
        """Of what comes next."""
        return self._kind

    def add(self, text: str) -> list[Piece]:
        """The pieces that are certain with this text."""
        self._held += text
        pieces: list[Piece] = []
        while (found := self._find()) is not None:
            at, marker, following = found
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            pieces += self._piece(before, closed=True)
            self._kind, self._fresh = following, following is not Kind.CALL
        if self._kind is not Kind.CALL:
            keep = max((overlap(self._held, marker) for marker, _ in self._awaited()), default=0)
            cut = len(self._held) - keep
            given, self._held = self._held[:cut], self._held[cut:]
            pieces += self._piece(given)
        return pieces

    def flush(self) -> list[Piece]:
        """The rest: no marker came."""
        given, self._held = self._held, ""
        # A call that nothing ends ends with the answer.
        return self._piece(given, closed=self._call is None or not self._call[1])

    def _awaited(self) -> list[tuple[str, Kind]]:
        """The markers that may come, with what they begin."""
        match self._kind:
            case Kind.REASONING:
                return [(self._thinking[1], Kind.TEXT)] if self._thinking else []
            case Kind.CALL:
                return [(self._call[1], Kind.TEXT)] if self._call and self._call[1] else []
            case Kind.TEXT:
                starts = [(self._thinking, Kind.REASONING), (self._call, Kind.CALL)]
                return [(markers[0], kind) for markers, kind in starts if markers is not None]

    def _find(self) -> tuple[int, str, Kind] | None:
        """The first marker: where, which, and what follows it."""
        found = [(self._held.find(marker), marker, kind) for marker, kind in self._awaited()]
        return min((one for one in found if one[0] >= 0), key=lambda one: one[0], default=None)

    def _piece(self, text: str, *, closed: bool = True) -> list[Piece]:
        if self._kind is Kind.CALL:
            return [Piece(Kind.CALL, text, closed)] if text or closed else []
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return [Piece(self._kind, text)] if text else []
