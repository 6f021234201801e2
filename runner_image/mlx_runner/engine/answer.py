"""The text of one answer. A pure function of the request and its tokens: fed the same again, it gives the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_runner.channel import Generate, Likelihood, TokenLogprobs, ToolCall

from . import tools
from .sampler import Logprobs
from .sections import Kind, Piece, Sections
from .text import Detokenizer, StopStrings, Tokenizer


@dataclass(frozen=True, slots=True)
class News:
    """What a token brought."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class AnswerText:
    """Turns the tokens of an answer into text, reasoning and tool calls."""

    def __init__(self, tokenizer: Tokenizer, request: Generate, prompt: Sequence[int]) -> None:
        self.tokens = 0
        self.reasoning_tokens = 0
        self.calls = 0
        self.ended = False
        """Nothing that follows is part of the answer: a stop string came, or the only call that is allowed."""
        self._tokenizer = tokenizer
        self._request = request
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(request.stop)
        self._form = tokenizer.tools if request.tools else None
        self._sections = _sections(tokenizer, prompt, tools=self._form is not None) if request.messages else None
        thinking = tokenizer.thinking
        texts = [*((thinking.start, thinking.end) if thinking else ()), *((self._form.start,) if self._form else ())]
        self._markers = frozenset(token for text in texts if (token := tokenizer.token_of(text)) is not None)

    def add(self, token: int, *, last: bool) -> News:
        """The next token; with the last one all that was held back is given."""
        self.tokens += 1
        self.reasoning_tokens += self._sections is not None and self._sections.kind is Kind.REASONING
        text = "" if self._hidden(token, last) else self._detokenizer.add(token)
        if last:
            text += self._detokenizer.flush()
        if self._sections is None:
            pieces = [Piece(Kind.TEXT, text)]
        else:
            pieces = self._sections.add(text) + (self._sections.flush() if last else [])
        return self._give(pieces, last)

    def _hidden(self, token: int, last: bool) -> bool:
        """Special tokens are no text, but where they mark or make up a section."""
        if token in self._tokenizer.eos and last:
            return True
        if token not in self._tokenizer.special:
            return False
        within = self._sections is not None and self._sections.kind is Kind.CALL
        return self._sections is None or not (within or token in self._markers)

    def _give(self, pieces: Sequence[Piece], last: bool) -> News:
        text, reasoning = "", ""
        calls: tuple[ToolCall, ...] = ()
        for piece in pieces:
            if self.ended:
                break
            match piece.kind:
                case Kind.REASONING:
                    reasoning += piece.text
                case Kind.TEXT:
                    text += self._stopped(piece.text)
                case Kind.CALL:
                    text += self._stops.flush()
                    found = self._called(piece)
                    calls += found
                    if not found:
                        text += self._stopped(self._verbatim(piece))
        if last and not self.ended:
            text += self._stops.flush()
        return News(text, reasoning, calls)

    def _stopped(self, text: str) -> str:
        given, self.ended = self._stops.add(text)
        return given

    def _called(self, piece: Piece) -> tuple[ToolCall, ...]:
        """The calls of a section; what is cut short, or is none, is given as the text that it is."""
        if self._form is None or not piece.closed:
            return ()
        found = tools.parse(self._form, piece.text, self._request.tools, self._request.id, self.calls)
        if found and not self._request.parallel_tool_calls:
            found, self.ended = found[:1], True
        self.calls += len(found)
        return found

    def _verbatim(self, piece: Piece) -> str:
        if self._form is None:
            return piece.text
        return self._form.start + piece.text + (self._form.end if piece.closed else "")

    def logprobs(self, token: int, found: Logprobs) -> TokenLogprobs:
        """As the client gets them."""
        own = self._likelihood(token, found.token)
        top = tuple(self._likelihood(other, logprob) for other, logprob in found.top)
        return TokenLogprobs(token=own.token, bytes=own.bytes, logprob=own.logprob, top=top)

    def _likelihood(self, token: int, logprob: float) -> Likelihood:
        text = self._tokenizer.decode([token])
        whole = "\ufffd" not in text
        # JSON has no infinity, and OpenAI's lowest value is this one.
        return Likelihood(token=text, bytes=tuple(text.encode()) if whole else None, logprob=max(logprob, -9999.0))


def _sections(tokenizer: Tokenizer, prompt: Sequence[int], *, tools: bool) -> Sections | None:
    thinking, form = tokenizer.thinking, tokenizer.tools if tools else None
    if thinking is None and form is None:
        return None
    return Sections(
        (thinking.start, thinking.end) if thinking else None,
        (form.start, form.end) if form else None,
        reasoning=thinking is not None and thinking.open_at_end(prompt),
    )
