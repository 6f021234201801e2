"""Requests on rank 0: text becomes tokens, tokens become text, in a thread beside the one that computes.

Everything about a request passes through one queue in the order it happened, so a cancel never overtakes its request.
"""

import contextlib
import itertools
import queue
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_runner import channel
from mlx_runner.channel import (
    INTERNAL_ERROR,
    Accepted,
    Cancel,
    Delta,
    Detokenize,
    Detokenized,
    Event,
    Finished,
    Generate,
    Refused,
    Tokenize,
    Tokenized,
)

from .answer import AnswerText
from .grammar import Matcher
from .prepare import Limits, Prepared, Preparer
from .sampler import Logprobs
from .scheduler import Emission, Row
from .text import PromptError, Tokenizer

Command = Generate | Cancel | Tokenize | Detokenize
Ending = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class CancelRow:
    """To the scheduler: end this row, and say so."""

    uid: int


@dataclass(slots=True)
class _Answer:
    """A request under way."""

    id: str
    prompt_tokens: int
    text: AnswerText
    grammar: Matcher | None


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
        self._preparer = Preparer(tokenizer, limits)
        self._submit = submit
        self._say = say
        self._inbox: queue.SimpleQueue[Command | Sequence[Emission]] = queue.SimpleQueue()
        self._uids = itertools.count(1)
        self._answers: dict[int, _Answer] = {}

    def put(self, item: Command | Sequence[Emission]) -> None:
        """A command of the supervisor, or what a turn brought; from any thread."""
        self._inbox.put(item)

    def start(self) -> None:
        """Run the thread."""
        threading.Thread(target=self._work, name="text", daemon=True).start()

    def _work(self) -> None:
        while True:
            self.handle(self._inbox.get())

    def handle(self, item: Command | Sequence[Emission]) -> None:
        """Work on one item of the queue."""
        match item:
            case Generate() | Tokenize() | Detokenize():
                with self._only(item.id):
                    self._begin(item)
            case Cancel():
                for uid, answer in self._answers.items():
                    if answer.id == item.id:
                        self._submit(CancelRow(uid))
            case _:
                for emission in item:
                    if (under_way := self._answers.get(emission.uid)) is None:
                        continue  # it was ended while this was computed
                    with self._only(under_way.id):
                        self._emit(emission, under_way)

    @contextlib.contextmanager
    def _only(self, request_id: str) -> Iterator[None]:
        """Work on one request: what goes wrong ends that one, and not the engine with all the others."""
        try:
            yield
        except PromptError as error:
            self._say(Refused(id=request_id, code=error.code, param=error.param, message=str(error)))
        except Exception as error:  # noqa: BLE001 (a bug of ours or of a library: told, and in the log)
            traceback.print_exception(error)  # for the pod's log
            for uid in [uid for uid, answer in self._answers.items() if answer.id == request_id]:
                del self._answers[uid]
                self._submit(CancelRow(uid))
            message = f"the engine failed on this request: {type(error).__name__}; its log says where"
            self._say(Refused(id=request_id, status=500, code=INTERNAL_ERROR, message=message))

    def _begin(self, command: Generate | Tokenize | Detokenize) -> None:
        match command:
            case Generate():
                self._generate(command, self._preparer.prepare(command))
            case Tokenize():
                tokens = self._preparer.tokens(command)
                texts = tuple(self._tokenizer.decode([t]) for t in tokens) if command.return_token_strs else None
                limit = self._preparer.limits.context
                param = "prompt" if command.messages is None else "messages"
                asked = "return_token_strs" if command.return_token_strs else param
                self._reply(Tokenized(id=command.id, tokens=tokens, max_model_len=limit, token_strs=texts), asked)
            case Detokenize():
                self._tokenizer.check(command.tokens, "tokens")
                self._reply(Detokenized(id=command.id, prompt=self._tokenizer.decode(command.tokens)), "tokens")

    def _reply(self, answer: Tokenized | Detokenized, param: str) -> None:
        """Answer a question, unless the supervisor would not take so long a line. `param`: what makes it long."""
        size, limit = len(channel.encode(answer)), channel.MAX_EVENT_BYTES
        if size > limit:
            remedy = f"leave {param} out, or ask" if param == "return_token_strs" else "ask"
            raise PromptError(
                f"{param}: the answer of {size} bytes is longer than {limit}: {remedy} in parts", param=param
            )
        self._say(answer)

    def _generate(self, request: Generate, prepared: Prepared) -> None:
        prompt, uid = prepared.prompt, next(self._uids)
        self._answers[uid] = _Answer(request.id, len(prompt), prepared.text, prepared.grammar)
        self._say(Accepted(id=request.id, prompt_tokens=len(prompt), max_tokens=prepared.max_tokens))
        ended = self._replay(prepared, request.resume)
        if ended is not None:
            self._finish(Emission(uid), self._answers[uid], ended)
            return
        given = request.resume
        self._submit(Row(uid, (*prompt, *given), prepared.max_tokens, prepared.sampler, given=len(given)))

    def _replay(self, prepared: Prepared, given: tuple[int, ...]) -> Ending | None:
        """Bring the answer to where a lost engine left it: its client has had it, so nothing is said.

        How it ends, where the given tokens end it already: its engine was lost before it could say so.
        """
        text = prepared.text
        for number, token in enumerate(given, start=1):
            prepared.sampler.accept(token)
            complete = token in self._tokenizer.eos or prepared.sampler.ended
            last = complete or number >= prepared.max_tokens
            text.add(token, last=last)
            if text.ended or last:
                text.tokens = len(given)
                return "stop" if text.ended or complete else "length"
        return None

    def _emit(self, emission: Emission, answer: _Answer) -> None:
        if emission.token is not None:
            self._token(answer, emission.token, emission.logprobs, last=emission.finish is not None)
        ended = answer.text.ended
        if ended and emission.finish is None:
            self._submit(CancelRow(emission.uid))
        if ended or emission.finish is not None:
            self._finish(emission, answer, "stop" if ended else emission.finish or "stop")

    def _token(self, answer: _Answer, token: int, logprobs: Logprobs | None, *, last: bool) -> None:
        """Give out what a token brought."""
        news = answer.text.add(token, last=last)
        told = logprobs is not None and not (last and token in self._tokenizer.eos)
        self._say(
            Delta(
                id=answer.id,
                text=news.text,
                tokens=(token,),
                reasoning=news.reasoning,
                tool_calls=news.calls,
                logprobs=(answer.text.logprobs(token, logprobs),) if told and logprobs else (),
            )
        )

    def _finish(self, last: Emission, answer: _Answer, reason: Ending) -> None:
        del self._answers[last.uid]
        error = answer.grammar.error if answer.grammar is not None else None
        if error is not None and reason == "stop":
            message = f"the grammar of the answer could not be followed: {error}"
            self._say(Refused(id=answer.id, status=500, code="grammar_failed", message=message))
            return
        self._say(
            Finished(
                id=answer.id,
                finish_reason="tool_calls" if reason == "stop" and answer.text.calls else reason,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.text.tokens,
                reasoning_tokens=answer.text.reasoning_tokens,
                cached_tokens=min(last.cached, answer.prompt_tokens),  # tokens given before count as the answer's
            )
        )
