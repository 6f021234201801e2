"""What both servers of a supervisor share: bodies within a limit and a deadline, listening sockets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from aiohttp import web

BODY_SECONDS = 30.0
WRITE_SECONDS = 30.0
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


@contextlib.asynccontextmanager
async def serving(app: web.Application, host: str, port: int) -> AsyncIterator[None]:
    """Serve an application while inside. A handler is cancelled when its client leaves.

    Raises:
        OSError: the address cannot be bound.
    """
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=_CLOSE_SECONDS,
        max_line_size=_HEADER_BYTES,
        max_field_size=_HEADER_BYTES,
        keepalive_timeout=75.0,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, reuse_address=True).start()
        yield
    finally:
        await runner.cleanup()
