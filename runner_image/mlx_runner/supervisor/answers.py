"""From a ticket to what an endpoint tells: the words of the engine, its pauses, and errors in OpenAI's shape."""

import asyncio
from collections.abc import AsyncIterator

from mlx_runner import channel

from .openai_errors import ApiError
from .requests import QUEUE_SECONDS, Broker, UnavailableError
from .tickets import NOT_READY, Lost, Outcome, Paused, Ticket

COMMENT_SECONDS = 3.0
"""How often a stream that waits for the next epoch shows life: proxies close what is silent for too long."""


async def dispatched(broker: Broker, ticket: Ticket) -> None:
    """Wait for a place, or for the next epoch of the group; raises `ApiError` when neither comes."""
    try:
        async with asyncio.timeout(QUEUE_SECONDS):
            # A client that leaves must not end the future: the broker would take that for a dispatch.
            await asyncio.shield(ticket.dispatched)
    except TimeoutError as error:
        broker.leave(ticket, Outcome.UNAVAILABLE)
        raise ApiError(503, f"no place for this request within {QUEUE_SECONDS:g} s", code="queue_timeout") from error
    except UnavailableError as error:
        raise ApiError(503, str(error), code=NOT_READY) from error


async def answers(ticket: Ticket) -> AsyncIterator[channel.Delta | channel.Finished | Paused]:
    """What the engines say of a request, `Finished` last; raises `ApiError` for anything that ends it otherwise.

    `Paused` comes when its engine is lost, and again every few seconds until the next one has it.
    """
    while True:
        try:
            async with asyncio.timeout(COMMENT_SECONDS if ticket.lost is not None else None):
                answer = await ticket.answers.get()
        except TimeoutError:
            answer = Paused(len(ticket.tokens))
        match answer:
            case channel.Accepted():
                continue
            case channel.Refused():
                raise ApiError(answer.status, answer.message, code=answer.code, param=answer.param)
            case Lost():
                raise ApiError(answer.status, answer.message, code=answer.code)
            case channel.Finished():
                yield answer
                return
            case _:
                yield answer
