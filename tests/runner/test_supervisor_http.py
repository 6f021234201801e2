"""Clients that are slow or silent: none of them holds a connection, a place or memory for ever."""

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from aiohttp import web

from mlx_operator_api.tasks import ServingOptions
from mlx_runner import channel
from mlx_runner.supervisor import generation, http
from mlx_runner.supervisor.openai_errors import ApiError
from mlx_runner.supervisor.openai_shapes import Chat, Form
from mlx_runner.supervisor.requests import Broker

from .supervisors import PATIENCE, loopback

PORT = 8080
SHORT = 0.3


class Server:
    """An application on an address of its own."""

    def __init__(self, handler: Any) -> None:
        self.host = loopback()
        self.app = web.Application(client_max_size=1024)
        self.app.router.add_post("/", handler)
        self.app.router.add_get("/", handler)

    def running(self, **options: Any) -> AbstractAsyncContextManager[None]:
        return http.serving(self.app, self.host, PORT, **options)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, PORT)


async def ok(request: web.Request) -> web.Response:
    try:
        return web.Response(text=str(len(await http.read_body(request))))
    except http.SlowClientError as error:
        return ApiError(408, str(error), code="timeout").response()


async def closed(reader: asyncio.StreamReader) -> bytes:
    """What still comes until the other side has closed."""
    async with asyncio.timeout(PATIENCE):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_connection_that_brings_no_request_is_closed(sent: bytes) -> None:
    server = Server(ok)
    async with server.running(header_seconds=SHORT):
        started = time.monotonic()
        reader, writer = await server.connect()
        writer.write(sent)
        assert await closed(reader) == b""
        assert time.monotonic() - started >= SHORT
        writer.close()


async def test_a_connection_that_has_had_a_request_may_rest() -> None:
    server = Server(ok)
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    async with server.running(header_seconds=SHORT):
        reader, writer = await server.connect()
        other, silent = await server.connect()
        for _ in range(2):
            writer.write(request)
            async with asyncio.timeout(PATIENCE):
                assert b"200" in await reader.readline()
                assert (await reader.readuntil(b"\r\n\r\n0")).endswith(b"0")
            await closed(other)  # by then the time for the first request has passed for both
        writer.close()
        silent.close()


async def test_headers_and_bodies_beyond_the_limits_are_refused() -> None:
    server = Server(ok)
    async with server.running():
        reader, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 40_000 + b"\r\n\r\n")
        assert b" 400 " in (await closed(reader)).split(b"\r\n")[0]
        writer.close()
        reader, writer = await server.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\nConnection: close\r\n\r\n" + b"x" * 5000)
        assert b" 413 " in (await closed(reader)).split(b"\r\n")[0]
        writer.close()


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_SECONDS", SHORT)
    server = Server(ok)
    async with server.running():
        reader, writer = await server.connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        async with asyncio.timeout(PATIENCE):
            assert b" 408 " in await reader.readline()
        writer.close()


class Endless:
    """An engine that gives one request text without end."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.cancelled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def send(self, command: channel.Command) -> None:
        match command:
            case channel.Generate():
                self._task = asyncio.create_task(self._answer(command.id))
            case channel.Cancel():
                self.cancelled.set()

    async def _answer(self, request: str) -> None:
        self.broker.deliver(channel.Accepted(id=request, prompt_tokens=1))
        while not self.cancelled.is_set():
            self.broker.deliver(channel.Delta(id=request, text="x" * 100_000, tokens=(1,)))
            await asyncio.sleep(0.01)
        counts = {"prompt_tokens": 1, "completion_tokens": 1}
        self.broker.deliver(channel.Finished(id=request, finish_reason="cancelled", **counts))


@pytest.fixture
async def broker() -> Broker:
    return Broker(lambda active: None)


@pytest.mark.parametrize("choices", [1, 3])
async def test_a_client_that_does_not_read_is_dropped_and_its_places_are_free(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, choices: int
) -> None:
    monkeypatch.setattr(http, "WRITE_SECONDS", SHORT)
    engine = Endless(broker)
    broker.open(engine.send, ServingOptions())
    ended = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        shape = Chat(Form("m", n=choices))
        commands = [channel.Generate(id=f"r-{number}", prompt="x") for number in range(choices)]
        try:
            return await generation.generate(request, broker, commands, "m", shape, stream=True)
        finally:
            ended.set()

    server = Server(stream)
    async with server.running():
        _, writer = await server.connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(PATIENCE):
            await ended.wait()
            await engine.cancelled.wait()
            await broker.idle.wait()
        writer.close()
