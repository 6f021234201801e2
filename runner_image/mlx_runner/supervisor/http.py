"""What both servers of a supervisor share: bodies within a limit and a deadline, listening sockets."""

import asyncio
import contextlib
import zlib
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
_WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
"""What bodies may be compressed with, as zlib takes it. Some clients send `deflate` without zlib's header."""
_HEADER_BYTES = 16 * 1024


class SlowClientError(Exception):
    """The client did not send, or take, its bytes in time."""


class BodyError(Exception):
    """The body is not what its headers say; the text is for the client."""


async def read_body(request: web.Request) -> bytes:
    """The body, decompressed.

    Raises:
        SlowClientError: it did not arrive in time.
        BodyError: it is not what its headers say.
        web.HTTPRequestEntityTooLarge: it is larger than the application's limit, as it was sent or decompressed.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            sent = await request.read()
    except TimeoutError as error:
        raise SlowClientError(f"the body did not arrive within {BODY_SECONDS:g} s") from error
    except web.RequestPayloadError as error:
        raise BodyError(f"the body cannot be read: {' '.join(str(error).split())}") from error
    return _decompressed(sent, request.headers.get("Content-Encoding", "identity"), request.client_max_size)


def _decompressed(sent: bytes, header: str, limit: int) -> bytes:
    encoding = header.strip().lower()
    if encoding == "identity":
        return sent
    if encoding not in _WINDOW_BITS:
        known = ", ".join(_WINDOW_BITS)
        raise BodyError(f"Content-Encoding {header!r} is not supported: send the body as it is, or as {known}")
    raw = encoding == "deflate" and sent[:1] and sent[0] & 0x0F != zlib.DEFLATED
    stream = zlib.decompressobj(-zlib.MAX_WBITS if raw else _WINDOW_BITS[encoding])
    try:
        body = stream.decompress(sent, limit + 1)
    except zlib.error as error:
        raise BodyError(f"the body is no {encoding}, as Content-Encoding says: {error}") from error
    if len(body) > limit:
        raise web.HTTPRequestEntityTooLarge(limit)
    if not stream.eof or stream.unused_data:
        what = "it ends too early" if not stream.eof else "more follows its end"
        raise BodyError(f"the body is no {encoding}, as Content-Encoding says: {what}")
    return body


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
        auto_decompress=False,  # what cannot be decompressed would be answered before any handler of ours
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
