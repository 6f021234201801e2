"""The public API of rank 0 as clients see it: answers, refusals, queue, metrics. The engine is the fake one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import openai
import pytest

from mlx_operator_api import names
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import (
    ServingOptions,
)

from .api_clients import CHAT, HELLO, TEXT, client, metric, post, value
from .fake_engine import ANSWER
from .supervisors import Group, group

S = RunnerState


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Group]:
    async with group(tmp_path, 1) as served:
        yield served


async def test_the_official_client_gets_answers_whole_and_streamed(instance: Group) -> None:
    await instance.ready()
    async with client(instance) as ai:
        whole = await ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, user="me")
        assert whole.choices[0].message.content == " ".join(ANSWER[:3])
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 3
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + 3

        stream = await ai.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(ANSWER)
        assert len({c.id for c in chunks}) == 1

        text = await ai.completions.create(model="tiny", prompt="once upon a time", max_tokens=2)
        assert text.choices[0].text == " ".join(ANSWER[:2])
        assert text.usage is not None
        assert text.usage.prompt_tokens == 4
        parts = [p async for p in await ai.completions.create(model="tiny", prompt=[1, 2], stream=True)]
        assert "".join(p.choices[0].text for p in parts) == TEXT

        assert [model.id async for model in ai.models.list()] == ["tiny"]
        assert (await ai.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError) as caught:
            await ai.chat.completions.create(model="gpt-4o", messages=HELLO)
        assert caught.value.code == "model_not_found"
        assert "'tiny'" in caught.value.message
        with pytest.raises(openai.BadRequestError) as refused:
            await ai.completions.create(model="tiny", prompt="refuse this")
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")


async def test_bad_requests_are_told_apart_by_field_code_and_status(instance: Group) -> None:
    await instance.ready()
    pod = instance.pods[0]
    for body, status, code, param in [
        ("{", 400, "invalid_json", None),
        ([], 400, "invalid_value", None),
        ({"messages": HELLO}, 400, "missing_required_parameter", "model"),
        ({**CHAT, "n": 0}, 400, "invalid_value", "n"),
        ({**CHAT, "n": 120}, 400, "invalid_value", "n"),
        ({**CHAT, "modalities": ["audio"]}, 400, "unsupported_parameter", "modalities"),
        ({**CHAT, "tools": [{"type": "function"}]}, 400, "missing_required_parameter", "tools[0].function"),
        ('{"model": NaN}', 400, "invalid_json", None),
        ("[" * 100 + "]" * 100, 400, "invalid_json", None),
        ({**CHAT, "colour": "red"}, 400, "unknown_parameter", "colour"),
        ({**CHAT, "temperature": 3}, 400, "invalid_value", "temperature"),
        ({**CHAT, "model": "other"}, 404, "model_not_found", "model"),
        ({**CHAT, "user": "x" * 3_000_000}, 413, "body_too_large", None),
    ]:
        got, answer, _ = await post(pod, body)
        error = answer["error"]
        assert (got, error["code"], error["param"]) == (status, code, param), error
        assert set(error) == {"message", "type", "param", "code"}
    status, answer, _ = await post(pod, CHAT, "/v1/embeddings")
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    assert pod.report.state is S.READY


async def test_before_the_first_ready_requests_are_refused_with_retry_after(instance: Group) -> None:
    pod = instance.pods[0]
    for step in (None, instance.create, instance.download):
        if step is not None:
            await step()
        status, answer, retry = await post(pod, CHAT)
        assert (status, answer["error"]["code"]) == (503, "not_ready")
        assert int(retry or 0) > 0
        assert await pod.status("/readyz", names.PUBLIC_PORT) == 503
        assert await pod.status("/healthz", names.PUBLIC_PORT) == 200


async def test_a_full_queue_is_told_and_the_others_are_answered_in_turn(instance: Group) -> None:
    pod = instance.pods[0]
    instance.serving = ServingOptions(max_concurrent_requests=1, max_queue=1)
    pod.plan(tokens=1000, token_seconds=0.05)
    await instance.ready()
    endless = asyncio.create_task(post(pod, CHAT))
    await pod.state(S.RUNNING, 1)
    queued = asyncio.create_task(post(pod, {**CHAT, "max_tokens": 2}))
    await metric(pod, "mlx_runner_num_requests_waiting 1.0")
    status, answer, retry = await post(pod, CHAT)
    assert (status, answer["error"]["code"], retry is not None) == (429, "queue_full", True)
    assert "serving.maxQueue=1" in answer["error"]["message"]
    endless.cancel()  # that client leaves
    status, answer, _ = await queued
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)


async def test_the_metrics_say_what_became_of_each_request_and_how_long_it_took(instance: Group) -> None:
    pod = instance.pods[0]
    assert (await post(pod, CHAT))[0] == 503
    instance.serving = ServingOptions(max_concurrent_requests=1, max_queue=0)
    pod.plan(token_seconds=0.05)
    await instance.ready()
    assert (await post(pod, {**CHAT, "max_tokens": 3}))[0] == 200
    assert (await post(pod, {**CHAT, "messages": [{"role": "user", "content": "refuse this"}]}))[0] == 400
    pod.plan(tokens=1000, token_seconds=0.05)
    leaves = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_num_requests_running 1.0")
    assert (await post(pod, CHAT))[0] == 429
    await metric(pod, "mlx_runner_time_to_first_token_seconds_count 2.0")
    leaves.cancel()
    await metric(pod, 'mlx_runner_requests_total{outcome="cancelled"} 1.0')
    await instance.shut_down()
    await instance.create(2)
    for line in (
        'mlx_runner_requests_total{outcome="finished"} 1.0',
        'mlx_runner_requests_total{outcome="refused"} 1.0',
        'mlx_runner_requests_total{outcome="queue_full"} 1.0',
        'mlx_runner_requests_total{outcome="unavailable"} 1.0',
        'mlx_runner_requests_total{outcome="lost"} 0.0',
        'mlx_runner_request_success_total{finished_reason="length"} 1.0',
        'mlx_runner_restarts_total{reason="Planned"} 1.0',
        'mlx_runner_http_requests_total{endpoint="/v1/chat/completions",status="429"} 1.0',
        "mlx_runner_request_generation_tokens_sum 3.0",
        "mlx_runner_e2e_request_latency_seconds_count 1.0",
        "mlx_runner_time_per_output_token_seconds_count 1.0",
        "mlx_runner_request_queue_time_seconds_count 3.0",
        "mlx_runner_prefix_cache_hits_total 0.0",
        "mlx_runner_num_requests_running 0.0",
        'mlx_runner_state{state="RunnerIdle"} 1.0',
    ):
        await metric(pod, line)
    # The engine gives a token every 50 ms; how late the first one is read is the machine's business.
    assert await value(pod, "mlx_runner_time_per_output_token_seconds_sum") >= 0.01
    assert await value(pod, 'mlx_runner_state_seconds_total{state="RunnerRunning"}') >= 0.1
    async with pod.http.get(pod.url("/metrics", names.PUBLIC_PORT)) as response:
        assert "mlx_runner_request_generation_tokens_sum 3.0" in (await response.text()).splitlines()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_place(instance: Group, stream: bool) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=100_000, token_seconds=0.02)
    await instance.ready()
    async with aiohttp.ClientSession() as session:
        url = pod.url("/v1/chat/completions", names.PUBLIC_PORT)
        running = asyncio.create_task(session.post(url, json={**CHAT, "stream": stream}))
        await pod.state(S.RUNNING, 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    running_seq = pod.report.seq
    await pod.until(lambda r: r.state is S.READY and r.seq > running_seq, "Ready again")
    assert all(r.failure is None for r in pod.reports)


async def test_only_rank_0_has_a_public_api_and_workers_are_ready_when_their_engine_is(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        worker = instance.pods[1]
        assert await worker.status("/readyz") == 503
        await instance.ready()
        assert await worker.status("/readyz") == 200
        with pytest.raises(aiohttp.ClientConnectorError):
            await worker.status("/healthz", names.PUBLIC_PORT)
