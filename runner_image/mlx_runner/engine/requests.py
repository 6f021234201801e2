"""Requests on rank 0: text becomes tokens, tokens become text, in a thread beside the one that computes.

Everything about a request passes through one queue in the order it happened, so a cancel never overtakes its request.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_runner.channel import Accepted, Cancel, Delta, Event, Finished, Generate, Load, Refused

from .scheduler import Emission, Row
from .text import Detokenizer, PromptError, StopStrings, Tokenizer

Ending = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class CancelRow:
    """To the scheduler: end this row, and say so."""

    uid: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a request, in tokens."""

    context: int
    answer: int | None

    @classmethod
    def of(cls, load: Load, model_context: int) -> "Limits":
        """What the spec says, or the model's own limit."""
        return cls(load.context_length or model_context, load.max_tokens)

    def max_tokens(self, asked: int | None, prompt: int) -> int:
        """Tokens of an answer: what was asked for or fits, up to the limit."""
        wanted = asked if asked is not None else self.context - prompt
        return min(wanted, self.answer) if self.answer is not None else wanted


@dataclass(slots=True)
class _Answer:
    """A request under way."""

    id: str
    prompt_tokens: int
    eos: frozenset[int]
    detokenizer: Detokenizer
    stops: StopStrings
    tokens: int = 0


class Requests:
    """The text thread. `submit` hands a row (or a cancel) to the scheduler's thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        submit: Callable[[Row | CancelRow], None],
        say: Callable[[Event], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._submit = submit
        self._say = say
        self._inbox: queue.SimpleQueue[Generate | Cancel | Sequence[Emission]] = queue.SimpleQueue()
        self._uids = itertools.count(1)
        self._answers: dict[int, _Answer] = {}

    def put(self, item: Generate | Cancel | Sequence[Emission]) -> None:
        """A command of the supervisor, or what a turn brought; from any thread."""
        self._inbox.put(item)

    def start(self) -> None:
        """Run the thread."""
        threading.Thread(target=self._work, name="text", daemon=True).start()

    def _work(self) -> None:
        while True:
            self.handle(self._inbox.get())

    def handle(self, item: Generate | Cancel | Sequence[Emission]) -> None:
        """Work on one item of the queue."""
        match item:
            case Generate():
                self._generate(item)
            case Cancel():
                for uid, answer in self._answers.items():
                    if answer.id == item.id:
                        self._submit(CancelRow(uid))
            case _:
                for emission in item:
                    self._emit(emission)

    def _generate(self, request: Generate) -> None:
        try:
            prompt, max_tokens = self._prompt(request)
        except PromptError as error:
            self._say(Refused(id=request.id, code=error.code, param=error.param, message=str(error)))
            return
        uid = next(self._uids)
        self._answers[uid] = _Answer(
            request.id, len(prompt), self._tokenizer.eos, Detokenizer(self._tokenizer), StopStrings(request.stop)
        )
        self._say(Accepted(id=request.id, prompt_tokens=len(prompt)))
        ended = self._replay(self._answers[uid], request.resume, max_tokens)
        if ended is not None:
            self._finish(Emission(uid), self._answers[uid], ended)
            return
        self._submit(
            Row(
                uid,
                (*prompt, *request.resume),
                max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                given=len(request.resume),
            )
        )

    def _replay(self, answer: _Answer, given: tuple[int, ...], max_tokens: int) -> Ending | None:
        """Bring the text to where a lost engine left it: its client has had it, so nothing is said.

        How the answer ends, where the given tokens end it already: its engine was lost before it could say so.
        """
        for number, token in enumerate(given, start=1):
            eos = token in answer.eos
            last = eos or number >= max_tokens
            _, stopped = self._text(answer, token, last=last)
            if stopped or last:
                answer.tokens = len(given)
                return "stop" if stopped or eos else "length"
        return None

    def _prompt(self, request: Generate) -> tuple[tuple[int, ...], int]:
        param = "prompt" if request.messages is None else "messages"
        if request.messages is not None:
            prompt = self._tokenizer.chat(request.messages)
        else:
            prompt = self._tokenizer.complete(request.prompt if request.prompt is not None else "")
        if not prompt:
            raise PromptError(f"{param} holds no text: at least one token is needed", param=param)
        max_tokens = self._limits.max_tokens(request.max_tokens, len(prompt))
        needed, context = len(prompt) + max_tokens, self._limits.context
        if needed > context or max_tokens < 1:
            asked = f"{max_tokens} in the answer" if max_tokens > 0 else "at least one in the answer"
            raise PromptError(
                f"the model's context holds {context} tokens; this request needs {len(prompt)} in the {param} "
                f"and {asked}: shorten the {param} or lower max_tokens",
                code="context_length_exceeded",
                param=param,
            )
        return prompt, max_tokens

    def _emit(self, emission: Emission) -> None:
        answer = self._answers.get(emission.uid)
        if answer is None:
            return  # ended by a stop string while this was computed
        stopped = False
        if emission.token is not None:
            stopped = self._token(answer, emission.token, last=emission.finish is not None)
        if stopped:
            self._submit(CancelRow(emission.uid))
        if stopped or emission.finish is not None:
            self._finish(emission, answer, "stop" if stopped else emission.finish or "stop")

    def _token(self, answer: _Answer, token: int, *, last: bool) -> bool:
        """Give out the text of a token; whether a stop string came."""
        text, stopped = self._text(answer, token, last=last)
        self._say(Delta(id=answer.id, text=text, tokens=(token,)))
        return stopped

    def _text(self, answer: _Answer, token: int, *, last: bool) -> tuple[str, bool]:
        """The text that is certain with a token, and whether a stop string came."""
        answer.tokens += 1
        ended = token in answer.eos and last
        text = "" if ended else answer.detokenizer.add(token)
        if last:
            text += answer.detokenizer.flush()
        text, stopped = answer.stops.add(text)
        if last and not stopped:
            text += answer.stops.flush()
        return text, stopped

    def _finish(self, last: Emission, answer: _Answer, reason: Ending) -> None:
        del self._answers[last.uid]
        self._say(
            Finished(
                id=answer.id,
                finish_reason=reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.tokens,
                cached_tokens=last.cached,
            )
        )
