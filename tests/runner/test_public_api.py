"""The public API by itself: whatever goes wrong with a request is told in OpenAI's shape."""

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from mlx_operator_api.tasks import ServingOptions
from mlx_runner import channel
from mlx_runner.supervisor.config import Config
from mlx_runner.supervisor.http import serving
from mlx_runner.supervisor.metrics import Metrics
from mlx_runner.supervisor.openai_api import CLIENT_LEFT, MAX_BODY_BYTES, PublicApi
from mlx_runner.supervisor.openai_shapes import Chat
from mlx_runner.supervisor.supervisor import Supervisor
from mlx_runner.supervisor.tickets import ServedModel

from .supervisors import PATIENCE, loopback

PORT = 8080
CHAT = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}).encode()


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)


class Served:
    """A public API in front of an engine that answers one word."""

    def __init__(self, api: PublicApi, supervisor: Supervisor, session: aiohttp.ClientSession) -> None:
        self.api = api
        self.broker = supervisor.broker
        self.session = session
        self.raises: Exception | None = None

    def send(self, command: channel.Command) -> None:
        if self.raises is not None:
            raise self.raises
        if isinstance(command, channel.Generate):
            self.broker.deliver(channel.Accepted(id=command.id, prompt_tokens=1))
            self.broker.deliver(channel.Delta(id=command.id, text="yes", tokens=(1,)))
            counts = {"prompt_tokens": 1, "completion_tokens": 1}
            self.broker.deliver(channel.Finished(id=command.id, finish_reason="stop", **counts))

    async def post(self, body: bytes, **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post("/v1/chat/completions", data=body, headers=sent) as response:
            assert response.content_type == "application/json", await response.text()
            return response.status, await response.json()

    async def counted(self, status: int) -> float:
        async with self.session.get("/metrics") as response:
            text = await response.text()
        wanted = f'mlx_runner_http_requests_total{{endpoint="/v1/chat/completions",status="{status}"}} '
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted)), 0.0)


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    supervisor = Supervisor(Config(uid="u", rank=0, token="t", state_dir=tmp_path))
    monkeypatch.setattr(type(supervisor), "served_name", property(lambda self: "tiny"))
    api, host = PublicApi(supervisor, Metrics(supervisor)), loopback()
    timeout = aiohttp.ClientTimeout(PATIENCE)
    async with (
        serving(api.app(), host, PORT),
        aiohttp.ClientSession(f"http://{host}:{PORT}", timeout=timeout) as session,
    ):
        served = Served(api, supervisor, session)
        served.broker.open(served.send, ServingOptions(), model=ServedModel("tiny"))
        yield served


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", _gzip(CHAT)),
        ("GZip", _gzip(CHAT)),
        ("deflate", zlib.compress(CHAT)),
        ("deflate", zlib.compress(CHAT, wbits=-zlib.MAX_WBITS)),
        ("identity", CHAT),
    ],
    ids=["gzip", "capitals", "deflate", "deflate-raw", "identity"],
)
async def test_a_compressed_body_is_read(served: Served, encoding: str, body: bytes) -> None:
    status, answer = await served.post(body, Content_Encoding=encoding)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "yes")


@pytest.mark.parametrize(
    ("encoding", "body", "words"),
    [
        ("gzip", b"junkjunk", "no gzip"),
        ("gzip", _gzip(CHAT)[:-9], "no gzip"),
        ("gzip", _gzip(CHAT) + b"junk", "no gzip"),
        ("gzip", b"", "no gzip"),
        ("deflate", b"junkjunk", "no deflate"),
        ("br", CHAT, "'br' is not supported"),
        ("zstd", CHAT, "'zstd' is not supported"),
        ("gzip, gzip", _gzip(_gzip(CHAT)), "'gzip, gzip' is not supported"),
    ],
    ids=["junk", "cut", "longer", "empty", "deflate", "br", "zstd", "twice"],
)
async def test_a_body_that_cannot_be_decompressed_is_told_by_its_header(
    served: Served, encoding: str, body: bytes, words: str
) -> None:
    status, answer = await served.post(body, Content_Encoding=encoding)
    assert (status, answer["error"]["code"]) == (400, "invalid_body")
    assert "Content-Encoding" in answer["error"]["message"] and words in answer["error"]["message"]


async def test_a_small_body_that_becomes_large_is_too_large(served: Served) -> None:
    status, answer = await served.post(_gzip(b" " * (MAX_BODY_BYTES + 1)), Content_Encoding="gzip")
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


async def test_a_bug_is_told_in_the_same_shape_logged_and_counted(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.raises = RuntimeError("a bug")
    status, answer = await served.post(CHAT)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (500, "server_error", "internal_error")
    assert "a bug" not in answer["error"]["message"]
    assert any(record.exc_info and "a bug" in str(record.exc_info[1]) for record in caplog.records)
    assert await served.counted(500) == 1


async def test_a_client_that_left_is_no_bug(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.raises = ConnectionResetError("Cannot write to closing transport")
    status, _ = await served.post(CHAT)
    assert status == CLIENT_LEFT
    assert not any(record.exc_info for record in caplog.records)
    assert (await served.counted(CLIENT_LEFT), await served.counted(500)) == (1, 0)


async def test_what_is_wrong_with_a_value_is_told_in_our_words(served: Served) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"const": "\ud800"}}}
    status, answer = await served.post(json.dumps({**json.loads(CHAT), "tools": [tool]}).encode())
    assert (status, answer["error"]["param"]) == (400, "tools[0].function.parameters")
    assert answer["error"]["message"].startswith("tools[0].function.parameters: no valid Unicode")


async def test_a_bug_in_an_answer_that_has_begun_breaks_it_off(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closing(self: Chat, number: int) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Chat, "closing", closing)
    body = json.dumps({**json.loads(CHAT), "stream": True}).encode()
    async with served.session.post("/v1/chat/completions", data=body) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert any(record.exc_info and "a bug" in str(record.exc_info[1]) for record in caplog.records)
