"""Answers to requests that generate: one ticket for each choice, told whole or as a stream."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

from aiohttp import web

from mlx_runner import channel

from .answers import answers, dispatched
from .http import SlowClientError, drop, write
from .openai_errors import ApiError, invalid
from .openai_shapes import Shape
from .requests import Broker, QueueFullError, UnavailableError
from .tickets import NOT_READY, Paused, Ticket

log = logging.getLogger(__name__)

EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Said = tuple[int, channel.Delta | channel.Finished | Paused]
"""The number of a choice, and what its engine says."""


@contextlib.contextmanager
def admission() -> Iterator[None]:
    """What the broker refuses, as an `ApiError`."""
    try:
        yield
    except UnavailableError as error:
        raise ApiError(503, str(error), code=NOT_READY) from error
    except QueueFullError as error:
        raise ApiError(429, str(error), code="queue_full") from error


async def generate(
    request: web.Request,
    broker: Broker,
    commands: Sequence[channel.Generate],
    model: str,
    shape: Shape,
    *,
    stream: bool,
) -> web.StreamResponse:
    """Answer a request. Every choice has a place of its own; all of them are freed when the client leaves."""
    if len(commands) > broker.capacity:
        what = f"{len(commands)} choices are more than this endpoint takes in at all: {broker.capacity}"
        raise invalid("n", f"{what} (serving.maxConcurrentRequests and serving.maxQueue)")
    tickets: list[Ticket] = []
    try:
        with admission():
            for command in commands:
                tickets.append(broker.enter(command, model))  # noqa: PERF401 (those before a refusal must leave)
        for ticket in tickets:
            await dispatched(broker, ticket)
        async with contextlib.aclosing(_merged(tickets)) as said:
            if stream:
                return await _stream(request, tickets, said, shape)
            return await _whole(said, shape)
    finally:
        # Also when the client left: the handler is cancelled then.
        for ticket in tickets:
            broker.leave(ticket)


async def _merged(tickets: Sequence[Ticket]) -> AsyncGenerator[Said, None]:
    """What is said of several requests, as it comes; raises what `answers` raises for any of them."""
    if len(tickets) == 1:
        async for answer in answers(tickets[0]):
            yield 0, answer
        return
    said: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def read(number: int, ticket: Ticket) -> None:
        try:
            async for answer in answers(ticket):
                said.put_nowait((number, answer))
        finally:
            said.put_nowait((number, None))

    tasks = [asyncio.create_task(read(number, ticket)) for number, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            number, answer = await said.get()
            if answer is None:
                left -= 1
                await tasks[number]  # raises what ended it
            else:
                yield number, answer
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(said: AsyncIterator[Said], shape: Shape) -> web.Response:
    async for number, answer in said:
        match answer:
            case channel.Delta():
                shape.rows[number].add(answer)
            case channel.Finished():
                shape.rows[number].finished = answer
    return web.json_response(shape.whole())


async def _stream(
    request: web.Request, tickets: Sequence[Ticket], said: AsyncIterator[Said], shape: Shape
) -> web.StreamResponse:
    # What is refused is refused with a status, before any stream begins: also what no engine has begun with.
    first = await _first(tickets, said)
    response = web.StreamResponse(headers=EVENT_STREAM)
    await response.prepare(request)
    try:
        try:
            for chunk in shape.opening():
                await send(response, chunk)
            await _tell(response, first, shape)
            async for one in said:
                await _tell(response, one, shape)
            for chunk in shape.ending():
                await send(response, chunk)
            await write(response, shape.done)
        except ApiError as error:
            # The status line is gone: an error event is the honest end, and no [DONE] after it.
            await send(response, shape.broken(error))
    except SlowClientError as error:
        log.info("a client was dropped from its stream: %s", error)
        drop(request)
    except ConnectionError as error:
        log.info("a client left its stream: %s", error or type(error).__name__)
    return response


async def _first(tickets: Sequence[Ticket], said: AsyncIterator[Said]) -> Said:
    async for number, answer in said:
        if tickets[number].begun or not isinstance(answer, Paused):
            return number, answer
    raise ApiError(500, "the engine ended the answer without a word", code=channel.INTERNAL_ERROR)


async def _tell(response: web.StreamResponse, one: Said, shape: Shape) -> None:
    """A comment, which clients skip, while the group restarts."""
    number, answer = one
    match answer:
        case channel.Delta():
            for chunk in shape.chunk(number, answer):
                await send(response, chunk)
        case Paused():
            await write(response, f": the group restarts, {answer.tokens} tokens given so far\n\n".encode())
        case channel.Finished():
            shape.rows[number].finished = answer
            for chunk in shape.closing(number):
                await send(response, chunk)


async def send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    """One event; named where its data has a type."""
    name = b"event: " + str(data["type"]).encode() + b"\n" if "type" in data else b""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    await write(response, name + b"data: " + text + b"\n\n")
