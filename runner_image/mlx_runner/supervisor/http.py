"""What both servers of a supervisor share: bodies within a limit and a deadline, listening sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

BODY_SECONDS = 30.0
WRITE_SECONDS = 30.0
HEADER_SECONDS = 30.0
"""From the connection to the end of the first request's headers."""
IDLE_SECONDS = 75.0
"""From the end of an answer to the end of the next request's headers."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_CLOSE_SECONDS = 1.0
_HEADER_BYTES = 16 * 1024


class SlowClientError(Exception):
    """The client did not send, or take, its bytes in time."""


async def read_body(request: web.Request) -> bytes:
    """The body.

    Raises:
        SlowClientError: it did not arrive in time.
        web.HTTPRequestEntityTooLarge: it is larger than the application's limit.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError as error:
        raise SlowClientError(f"the body did not arrive within {BODY_SECONDS:g} s") from error


async def write(response: web.StreamResponse, data: bytes) -> None:
    """Write to a stream.

    Raises:
        SlowClientError: the client does not read.
        ConnectionError: it is gone.
    """
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(data)
    except TimeoutError as error:
        raise SlowClientError(f"the client did not read for {WRITE_SECONDS:g} s") from error


class _Greetings:
    """Closes connections that bring no request: aiohttp waits for the first one for ever."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._silent: dict[asyncio.BaseProtocol, asyncio.TimerHandle] = {}

    @web.middleware
    async def hear(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The headers of a request are there."""
        timer = self._silent.pop(request.protocol, None)
        if timer is not None:
            timer.cancel()
        return await handler(request)

    def watch(self, protocol: web.RequestHandler) -> web.RequestHandler:
        """A new connection."""
        loop = asyncio.get_running_loop()
        self._silent[protocol] = loop.call_later(self._seconds, self._close, protocol)
        return protocol

    def _close(self, protocol: web.RequestHandler) -> None:
        del self._silent[protocol]
        if protocol.transport is not None:
            protocol.transport.abort()


def drop(request: web.Request) -> None:
    """Close a connection at once: a client that does not read would keep even its end waiting."""
    if request.transport is not None:
        request.transport.abort()


@contextlib.asynccontextmanager
async def serving(
    app: web.Application, host: str, port: int, *, header_seconds: float = HEADER_SECONDS
) -> AsyncIterator[None]:
    """Serve an application while inside. A handler is cancelled when its client leaves.

    Raises:
        OSError: the address cannot be bound.
    """
    greetings = _Greetings(header_seconds)
    app.middlewares.insert(0, greetings.hear)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=_CLOSE_SECONDS,
        max_line_size=_HEADER_BYTES,
        max_field_size=_HEADER_BYTES,
        keepalive_timeout=IDLE_SECONDS,
    )
    await runner.setup()
    make = runner.server
    if make is None:
        raise RuntimeError("aiohttp has set up no server")
    try:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: greetings.watch(make()), host, port, reuse_address=True, backlog=128)
        try:
            yield
        finally:
            server.close()
    finally:
        await runner.cleanup()
