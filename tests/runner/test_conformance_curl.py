"""curl and a real engine: what a person at a shell sends and sees, byte for byte."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mlx_operator_api import names

from . import tiny_models
from .api_clients import metric, value
from .supervisors import PATIENCE, Group, group
from .test_supervisor_with_engine import ENVIRONMENT

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = "a-key-of-a-client"
BEARER = ("-H", f"Authorization: Bearer {KEY}")
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "the runner"}], "temperature": 0, "max_tokens": 8}
STREAM = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Group]:
    home = tmp_path_factory.mktemp("curl")
    tiny_models.build(home / "models" / "tiny", "qwen2")
    (home / "keys").write_text(f"{KEY}\n")
    keys = {names.ENV_API_KEY_FILE: str(home / "keys")}
    async with group(home, 1, engine=None, models=home / "models", **ENVIRONMENT, **keys) as instance:
        await instance.ready()
        yield instance


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str

    @property
    def json(self) -> Any:
        assert self.headers["content-type"].startswith("application/json")
        return json.loads(self.body)

    @property
    def text(self) -> str:
        content: str = self.json["choices"][0]["message"]["content"]
        return content


async def curl(served: Group, path: str, *arguments: str, body: object = None, code: int = 0) -> Answer:
    """Run curl; `body` is sent as JSON. `code` is the exit code that it must have."""
    sent = () if body is None else ("-H", "Content-Type: application/json", "-d", json.dumps(body))
    url = served.pods[0].url(path, names.PUBLIC_PORT)
    argv = ("curl", "-sS", "-i", "--max-time", str(PATIENCE), *arguments, *sent, url)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdout=pipe, stderr=pipe)
    out, errors = await process.communicate()
    assert process.returncode == code, errors
    return answer(out.decode())


def answer(text: str) -> Answer:
    head, _, body = text.partition("\r\n\r\n")
    while " 100 " in head.split("\r\n")[0]:
        head, _, body = body.partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


def events(body: str) -> list[Any]:
    """The data of a stream's events, each of which is one line and an empty one; the last is [DONE]."""
    *whole, rest = body.split("\n\n")
    assert rest == "" and all(part.startswith("data: ") and "\n" not in part for part in whole)
    assert whole[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in whole[:-1]]


async def test_a_chat_is_answered(served: Group) -> None:
    found = await curl(served, "/v1/chat/completions", *BEARER, body=ASKED)
    assert found.status == 200
    assert (found.json["object"], found.json["model"]) == ("chat.completion", "tiny")
    assert found.text
    assert found.json["usage"]["completion_tokens"] <= 8
    assert int(found.headers["content-length"]) == len(found.body.encode())


async def test_a_stream_comes_in_events_that_end_with_done(served: Group) -> None:
    whole = await curl(served, "/v1/chat/completions", *BEARER, body=ASKED)
    found = await curl(served, "/v1/chat/completions", "-N", *BEARER, body=STREAM)
    assert (found.status, found.headers["content-type"]) == (200, "text/event-stream")
    assert found.headers["cache-control"] == "no-cache"
    chunks = events(found.body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"]) == whole.text
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == whole.json["usage"]["total_tokens"]


async def test_events_are_sent_as_they_come_and_a_client_that_leaves_ends_its_request(served: Group) -> None:
    pod = served.pods[0]
    asked = json.dumps({**STREAM, "max_tokens": 1500})
    argv = ("curl", "-sSN", *BEARER, "-H", "Content-Type: application/json", "-d", asked)
    url = pod.url("/v1/chat/completions", names.PUBLIC_PORT)
    process = await asyncio.create_subprocess_exec(*argv, url, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        assert (await process.stdout.readline()).startswith(b"data: {")
        assert await value(pod, "mlx_runner_num_requests_running") == 1.0, "the first event came before the last"
        process.kill()
        await process.wait()
    await metric(pod, "mlx_runner_num_requests_running 0.0")


async def test_old_http_and_compression_change_nothing(served: Group) -> None:
    plain = await curl(served, "/v1/chat/completions", *BEARER, body=ASKED)
    old = await curl(served, "/v1/chat/completions", "--http1.0", *BEARER, body=ASKED)
    assert old.text == plain.text
    streamed = await curl(served, "/v1/chat/completions", "--http1.0", "-N", *BEARER, body=STREAM)
    assert "transfer-encoding" not in streamed.headers
    assert events(streamed.body)
    assert (await curl(served, "/v1/chat/completions", "--compressed", *BEARER, body=ASKED)).text == plain.text
    waited = await curl(served, "/v1/chat/completions", "-H", "Expect: 100-continue", *BEARER, body=ASKED)
    assert waited.text == plain.text


async def test_the_json_counts_and_not_what_curl_calls_it(served: Group) -> None:
    """`curl -d` says that it sends a form."""
    found = await curl(served, "/v1/chat/completions", *BEARER, "-d", json.dumps(ASKED))
    assert found.text


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({**ASKED, "model": "gpt-4"}, 404, {"code": "model_not_found", "param": "model"}),
        ({**ASKED, "colour": 1}, 400, {"param": "colour"}),
        ({**ASKED, "temperature": 3}, 400, {"param": "temperature"}),
        ({**ASKED, "messages": []}, 400, {"param": "messages"}),
        ("no object", 400, {}),
    ],
)
async def test_an_error_is_a_status_and_a_body_that_names_the_field(
    served: Group, body: object, status: int, error: dict[str, str]
) -> None:
    found = await curl(served, "/v1/chat/completions", *BEARER, body=body)
    assert found.status == status
    told = found.json["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["type"] == "invalid_request_error" and told["message"]
    assert {key: told[key] for key in error} == error
    streamed = await curl(served, "/v1/chat/completions", "-N", *BEARER, body=_streamed(body))
    assert (streamed.status, streamed.json["error"]) == (status, told), "refused before a stream begins"


def _streamed(body: object) -> object:
    return {**body, "stream": True} if isinstance(body, dict) else body


async def test_curls_own_exit_code_tells_an_error(served: Group) -> None:
    found = await curl(served, "/v1/chat/completions", "--fail-with-body", *BEARER, body={"model": "gpt-4"}, code=22)
    assert found.json["error"]["message"]


async def test_what_is_no_json_too_large_or_unknown_is_told(served: Group, tmp_path: Path) -> None:
    broken = await curl(served, "/v1/completions", *BEARER, "-d", "{'model': 'tiny'}")
    assert (broken.status, broken.json["error"]["code"]) == (400, "invalid_json")
    large = tmp_path / "large.json"
    large.write_text(json.dumps({"model": "tiny", "prompt": "x" * (3 << 20)}))
    refused = await curl(served, "/v1/completions", *BEARER, "-d", f"@{large}")
    assert (refused.status, refused.json["error"]["code"]) == (413, "body_too_large")
    unknown = await curl(served, "/v1/chat", *BEARER, body=ASKED)
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "unknown_url")
    method = await curl(served, "/v1/chat/completions", *BEARER)
    assert (method.status, method.json["error"]["code"]) == (405, "method_not_allowed")


async def test_the_models_are_listed_and_one_can_be_asked_for(served: Group) -> None:
    listed = await curl(served, "/v1/models", *BEARER)
    (model,) = listed.json["data"]
    assert (listed.status, listed.json["object"], model["id"], model["object"]) == (200, "list", "tiny", "model")
    assert (await curl(served, "/v1/models/tiny", *BEARER)).json == model
    assert (await curl(served, "/v1/models/other", *BEARER)).status == 404
    head = await curl(served, "/v1/models", "--head", *BEARER)
    assert (head.status, head.body) == (200, "")


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ((), "missing_api_key"),
        (("-H", f"X-Api-Key: {KEY}"), "missing_api_key"),
        (("-H", "Authorization: Bearer wrong"), "invalid_api_key"),
    ],
)
async def test_without_the_key_nothing_is_answered_and_the_scheme_is_named(
    served: Group, header: tuple[str, ...], code: str
) -> None:
    for path, body in (("/v1/models", None), ("/v1/chat/completions", ASKED)):
        found = await curl(served, path, *header, body=body)
        assert (found.status, found.headers["www-authenticate"]) == (401, "Bearer")
        assert found.json["error"]["code"] == code
    assert (await curl(served, "/healthz", *header)).status == 200
    assert (await curl(served, "/v1/models", "--oauth2-bearer", KEY)).status == 200
