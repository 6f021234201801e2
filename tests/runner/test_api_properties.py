"""Requests made from the published OpenAPI document, right and wrong ones: none is answered by a server error."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from mlx_operator_api import names
from mlx_runner.supervisor import openapi

from . import tiny_models
from .supervisors import PATIENCE, Group, group
from .test_supervisor_with_engine import ENVIRONMENT

pytestmark = pytest.mark.asyncio(loop_scope="module")
EXAMPLES = 25
POSTS = [endpoint.path for endpoint in openapi.ENDPOINTS if endpoint.body is not None]
GETS = [endpoint.path for endpoint in openapi.ENDPOINTS if endpoint.body is None]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Group]:
    home = tmp_path_factory.mktemp("properties")
    model = tiny_models.build(home / "models" / "tiny", "qwen2")
    tiny_models.write_tokenizer(model, tiny_models.TOOLS_TEMPLATE, tiny_models.TOOLS_TOKENS)
    async with group(home, 1, engine=None, models=home / "models", **ENVIRONMENT) as instance:
        await instance.ready()
        yield instance


def bounded(body: Any) -> Any:
    """The same request for the model that is served, with a short answer: it is the parsing that is looked at."""
    if not isinstance(body, dict):
        return body
    small = {"n": 2, "max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3}
    limits = {name: min(body[name], most) for name, most in small.items() if type(body.get(name)) is int}
    body = {**body, **limits}
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    generates = "messages" in body or ("prompt" in body and "model" in body)
    if generates and "max_completion_tokens" not in body:
        body.setdefault("max_tokens", 3)
    if "input" in body:
        body.setdefault("max_output_tokens", 3)
    return body


ALWAYS = {"model", "messages", "prompt", "input", "tokens"}


def fewer(body: Any, data: st.DataObject) -> Any:
    """With some of its optional fields only: what is allowed by itself is often not allowed together."""
    if not isinstance(body, dict):
        return body
    optional = sorted(set(body) - ALWAYS)
    kept = data.draw(st.sets(st.sampled_from(optional), max_size=3)) if optional else set()
    body = {name: value for name, value in body.items() if name in ALWAYS | kept}
    if "prompt" in body and "messages" in body:  # one of them, which the document says in words
        del body[data.draw(st.sampled_from(["prompt", "messages"]))]
    if isinstance(body.get("messages"), list) and data.draw(st.booleans()):
        body["messages"] = [plain(message) for message in body["messages"]]
    return body


def plain(message: Any) -> Any:
    """A message of a role that needs nothing but content."""
    if not isinstance(message, dict):
        return message
    role, content = message.get("role"), message.get("content")
    return {"role": "user" if role == "tool" else role, "content": "" if content is None else content}


def ask(path: str, method: str, mode: GenerationMode, base_url: str) -> set[int]:
    """The statuses of many requests."""
    schema = schemathesis.openapi.from_dict(openapi.document())
    operation = schema[path][method]
    statuses: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        case.body = bounded(fewer(case.body, data))
        response = case.call(base_url=base_url, timeout=PATIENCE)
        assert response.status_code < 500, (case.body, response.text)
        if response.status_code >= 400 and response.status_code != 406:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        statuses.add(response.status_code)

    check()
    return statuses


@pytest.mark.parametrize("path", POSTS)
async def test_requests_as_they_are_described_are_answered_or_refused_with_a_reason(served: Group, path: str) -> None:
    url = served.pods[0].url("", names.PUBLIC_PORT)
    statuses = await asyncio.to_thread(ask, path, "POST", GenerationMode.POSITIVE, url)
    assert {200} < statuses <= {200, 400}, "some are whole, some ask for what this model cannot do"
    assert await served.pods[0].status("/readyz", names.PUBLIC_PORT) == 200


@pytest.mark.parametrize("path", POSTS)
async def test_requests_that_break_the_description_are_refused(served: Group, path: str) -> None:
    url = served.pods[0].url("", names.PUBLIC_PORT)
    statuses = await asyncio.to_thread(ask, path, "POST", GenerationMode.NEGATIVE, url)
    assert 400 in statuses
    assert all(report.failure is None for report in served.pods[0].reports)


@pytest.mark.parametrize("path", GETS)
async def test_what_is_only_read_is_there(served: Group, path: str) -> None:
    url = served.pods[0].url("", names.PUBLIC_PORT)
    statuses = await asyncio.to_thread(ask, path, "GET", GenerationMode.POSITIVE, url)
    assert statuses <= {200, 404}


async def test_the_document_that_is_served_is_the_one_that_is_tested(served: Group, tmp_path: Path) -> None:
    pod = served.pods[0]
    async with pod.http.get(pod.url("/openapi.json", names.PUBLIC_PORT)) as response:
        assert await response.json() == openapi.document()
