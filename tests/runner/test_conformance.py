"""The official client and a real engine: every endpoint, whole and streamed, as users have them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel, Field

from mlx_operator_api import names

from . import tiny_models
from .supervisors import PATIENCE, Group, Pod, group
from .test_supervisor_with_engine import ENVIRONMENT

pytestmark = pytest.mark.asyncio(loop_scope="module")
HELLO: list[Any] = [{"role": "user", "content": "the runner"}]
KEY = "a-key-of-a-client"
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}


class Person(BaseModel):
    """What an answer must be."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)


class Weather(BaseModel):
    """The weather of a place."""

    days: int = Field(ge=0, le=9)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Group]:
    home = tmp_path_factory.mktemp("conformance")
    model = tiny_models.build(home / "models" / "tiny", "qwen2")
    tiny_models.write_tokenizer(model, tiny_models.TOOLS_TEMPLATE, tiny_models.TOOLS_TOKENS)
    (home / "keys").write_text(f"another-key\n{KEY}\n")
    async with group(
        home,
        1,
        engine=None,
        models=home / "models",
        **ENVIRONMENT,
        **{names.ENV_API_KEY_FILE: str(home / "keys")},
    ) as instance:
        await instance.ready()
        yield instance


@pytest_asyncio.fixture(loop_scope="module")
async def ai(served: Group) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=served.base_url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def sync(served: Group) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.base_url, api_key=KEY, max_retries=0, timeout=PATIENCE) as client:
        yield client


async def test_whole_and_streamed_answers_are_the_same_text(ai: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 3, "max_tokens": 12, "extra_body": QUIET}
    whole = await ai.chat.completions.create(**asked)
    assert whole.usage is not None and whole.usage.completion_tokens <= 12
    stream = await ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    streamed = chunks[-1].usage
    assert streamed is not None
    counts = [(usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) for usage in (streamed, whole.usage)]
    assert counts[0] == counts[1]
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


async def test_the_synchronous_client_gets_the_same(sync: openai.OpenAI) -> None:
    def ask() -> tuple[str, str]:
        asked: dict[str, Any] = {"model": "tiny", "prompt": "the runner", "temperature": 0, "max_tokens": 8}
        whole = sync.completions.create(**asked).choices[0].text
        return whole, "".join(part.choices[0].text for part in sync.completions.create(**asked, stream=True))

    whole, streamed = await asyncio.to_thread(ask)
    assert whole == streamed != ""


async def test_choices_are_seeded_apart_and_counted_together(ai: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 1.0}
    several = await ai.completions.create(**asked, prompt=["the runner", "holds one"], n=2, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    single = await ai.completions.create(**asked, prompt="holds one", seed=6)
    assert several.choices[3].text == single.choices[0].text
    assert several.usage is not None and single.usage is not None
    first = await ai.completions.create(**asked, prompt="the runner", seed=5)
    assert first.usage is not None
    assert several.usage.prompt_tokens == first.usage.prompt_tokens + single.usage.prompt_tokens
    assert several.usage.total_tokens == several.usage.prompt_tokens + several.usage.completion_tokens
    texts = [""] * 4
    async for part in await ai.completions.create(
        **asked, prompt=["the runner", "holds one"], n=2, seed=5, stream=True
    ):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [choice.text for choice in several.choices]


async def test_logprobs_in_both_forms(ai: openai.AsyncOpenAI) -> None:
    chat = await ai.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2, extra_body=QUIET
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    for one in chat.choices[0].logprobs.content:
        assert one.top_logprobs[0].token == one.token
        assert one.logprob <= 0 and len(one.top_logprobs) == 2
    stream = await ai.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, stream=True, extra_body=QUIET
    )
    streamed = [
        one
        for part in [p async for p in stream]
        if part.choices[0].logprobs
        for one in part.choices[0].logprobs.content or []
    ]
    assert [one.token for one in streamed] == [one.token for one in chat.choices[0].logprobs.content]
    text = await ai.completions.create(model="tiny", prompt="the", temperature=0, max_tokens=4, logprobs=3)
    found = text.choices[0].logprobs
    assert found is not None and found.tokens is not None and found.text_offset is not None
    assert found.token_logprobs is not None and found.top_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 4
    assert found.text_offset[:2] == [0, len(found.tokens[0])]


async def test_parse_gives_the_object_of_a_schema(ai: openai.AsyncOpenAI) -> None:
    done = await ai.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Person, seed=1, extra_body=QUIET
    )
    person = done.choices[0].message.parsed
    assert person is not None and 0 <= person.age <= 99
    assert done.choices[0].finish_reason == "stop"
    anything = await ai.chat.completions.create(
        model="tiny",
        messages=HELLO,
        response_format={"type": "json_object"},
        max_tokens=60,
        seed=2,
        extra_body=QUIET,
    )
    assert (anything.choices[0].message.content or "").startswith("{")


async def test_a_forced_tool_call_is_parsed_whole_and_as_a_stream(ai: openai.AsyncOpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "Weather"}},
        "seed": 4,
        "extra_body": QUIET,
    }
    done = await ai.chat.completions.parse(**asked)
    assert done.choices[0].finish_reason == "tool_calls"
    (call,) = done.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    async with ai.chat.completions.stream(**asked) as stream:
        events = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in events
    (streamed,) = final.choices[0].message.tool_calls or []
    assert streamed.function.arguments == call.function.arguments
    answer = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call.model_dump(exclude={"function": {"parsed_arguments"}})]},
        {"role": "tool", "tool_call_id": call.id, "content": "sun"},
    ]
    after = await ai.chat.completions.create(
        model="tiny",
        messages=answer,
        tools=[tool],
        max_tokens=3,
        extra_body=QUIET,
    )
    assert after.choices[0].message.content is not None


async def test_reasoning_comes_apart_from_the_answer(ai: openai.AsyncOpenAI) -> None:
    whole = await ai.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=5,
        temperature=0,
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    )
    message = whole.choices[0].message.model_dump()
    assert message["content"] == "" and message["reasoning_content"]
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 5
    quiet = await ai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, temperature=0, reasoning_effort="none"
    )
    assert quiet.choices[0].message.content


async def test_responses_whole_streamed_and_parsed(ai: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "the runner", "temperature": 0, "max_output_tokens": 6}
    whole = await ai.responses.create(**asked, instructions="be brief", reasoning={"effort": "none"})
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.output_text and whole.usage is not None and whole.usage.output_tokens == 6
    async with ai.responses.stream(**asked, instructions="be brief", reasoning={"effort": "none"}) as stream:
        events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    thinking = await ai.responses.create(model="tiny", input=HELLO, temperature=0, max_output_tokens=6)
    assert [item.type for item in thinking.output] == ["reasoning", "message"]
    kinds = [event.type async for event in await ai.responses.create(**asked, stream=True)]
    assert "response.reasoning_text.delta" in kinds
    parsed = await ai.responses.parse(
        model="tiny", input="the runner", text_format=Person, reasoning={"effort": "none"}, extra_body={"seed": 1}
    )
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Person)
    for field, value in [("store", True), ("previous_response_id", "resp_1"), ("tools", [{"type": "web_search"}])]:
        with pytest.raises(openai.BadRequestError) as refused:
            await ai.responses.create(**{**asked, field: value})
        assert refused.value.param == field


async def test_tokens_of_a_prompt_and_of_a_conversation(served: Group) -> None:
    url = served.pods[0].url("", names.PUBLIC_PORT)
    http, headers = served.pods[0].http, {"Authorization": f"Bearer {KEY}"}

    async def post(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        async with http.post(url + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    status, found = await post("/tokenize", {"model": "tiny", "prompt": "the runner", "return_token_strs": True})
    assert (status, found["max_model_len"], "".join(found["token_strs"])) == (200, tiny_models.CONTEXT, "the runner")
    assert found["count"] == len(found["tokens"]) > 0
    assert await post("/detokenize", {"tokens": found["tokens"]}) == (200, {"prompt": "the runner"})
    status, chat = await post("/tokenize", {"messages": HELLO})
    assert status == 200 and chat["count"] > found["count"]
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "colour": 1}, "colour"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ]
    for path, body, param in wrong:
        status, answer = await post(path, body)
        assert (status, answer["error"]["param"]) == (400, param)


async def raw_status(pod: Pod, request: bytes) -> int:
    """The status that bytes get which no client library would send."""
    reader, writer = await asyncio.open_connection(pod.host, names.PUBLIC_PORT)
    try:
        writer.write(request)
        async with asyncio.timeout(PATIENCE):
            return int((await reader.readline()).split()[1])
    finally:
        writer.close()
        await writer.wait_closed()


async def test_only_those_with_a_key_are_answered_and_probes_are_for_all(served: Group, ai: openai.AsyncOpenAI) -> None:
    pod = served.pods[0]
    for key in ("wrong", KEY[:-1], f"{KEY} {KEY}"):
        with pytest.raises(openai.AuthenticationError) as refused:
            await ai.with_options(api_key=key).models.list()
        assert refused.value.code == "invalid_api_key"
    assert await raw_status(pod, b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n") == 401
    async with pod.http.get(pod.url("/v1/models", names.PUBLIC_PORT), headers={"Authorization": ""}) as response:
        assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
        async with pod.http.get(pod.url(path, names.PUBLIC_PORT), headers={"Authorization": ""}) as response:
            assert response.status == 200
    for path in ("/tokenize", "/detokenize", "/v1/unknown"):
        async with pod.http.post(pod.url(path, names.PUBLIC_PORT), json={}) as response:
            assert response.status == 401
    assert [model.id async for model in ai.with_options(api_key="another-key").models.list()] == ["tiny"]
    keys = pod.home.parent / "keys"
    before = keys.read_text()
    try:
        (keys.parent / "new-keys").write_text("rotated\n")
        (keys.parent / "new-keys").replace(keys)
        assert [model.id async for model in ai.with_options(api_key="rotated").models.list()] == ["tiny"]
        with pytest.raises(openai.AuthenticationError):
            await ai.models.list()
        keys.unlink()
        with pytest.raises(openai.InternalServerError) as unreadable:
            await ai.with_options(api_key="rotated").models.list()
        assert (unreadable.value.status_code, unreadable.value.code) == (503, "api_keys_unreadable")
    finally:
        keys.write_text(before)
    assert [model.id async for model in ai.models.list()] == ["tiny"]
