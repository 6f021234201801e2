"""Questions to the engine that need no place among the requests, such as the tokens of a text."""

import asyncio
from collections.abc import Callable

from mlx_runner import channel

from .tickets import unsayable

ANSWER_SECONDS = 30.0
"""The engine's text thread answers at once; what takes longer is lost."""
Question = channel.Tokenize | channel.Detokenize
QuestionAnswer = channel.Tokenized | channel.Detokenized | channel.Refused


class QuestionLostError(Exception):
    """No engine answered; the text says why."""


class Questions:
    """Those that wait for their answer."""

    def __init__(self) -> None:
        self._send: Callable[[channel.Command], None] | None = None
        self._asked: dict[str, asyncio.Future[QuestionAnswer]] = {}

    def open(self, send: Callable[[channel.Command], None]) -> None:
        """The engine answers from now on."""
        self._send = send

    def lose(self, why: str) -> None:
        """The engine is gone, and with it what it was asked."""
        self._send = None
        for future in self._asked.values():
            if not future.done():
                future.set_exception(QuestionLostError(why))

    def deliver(self, answer: QuestionAnswer) -> None:
        """A word of the engine; one that nobody waits for is dropped."""
        future = self._asked.get(answer.id)
        if future is not None and not future.done():
            future.set_result(answer)

    async def ask(self, question: Question) -> QuestionAnswer:
        """The engine's answer.

        Raises:
            QuestionLostError: there is no engine, it was lost, or it did not answer in time.
        """
        if self._send is None:
            raise QuestionLostError("the model is not ready")
        future: asyncio.Future[QuestionAnswer] = asyncio.get_running_loop().create_future()
        self._asked[question.id] = future
        try:
            self._send(question)
            async with asyncio.timeout(ANSWER_SECONDS):
                return await future
        except channel.EncodingError as error:
            return unsayable(question.id, error)
        except TimeoutError as error:
            raise QuestionLostError(f"the engine did not answer within {ANSWER_SECONDS:g} s") from error
        finally:
            del self._asked[question.id]
