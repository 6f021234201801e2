"""The public API of rank 0 as clients see it: answers, refusals, failures, restarts. The engine is the fake one."""

import asyncio
import io
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import (
    DeadlineSeconds,
    DownloadModel,
    GroupCause,
    LoadModel,
    ServingOptions,
    Shutdown,
)

from .fake_engine import ANSWER
from .supervisors import PATIENCE, Group, Pod, group

TEXT = " ".join(ANSWER)
HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
CHAT = {"model": "tiny", "messages": HELLO}
S = RunnerState


def client(instance: Group) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=instance.base_url, api_key="unused", max_retries=0, timeout=PATIENCE)


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Group]:
    async with group(tmp_path, 1) as served:
        yield served


async def post(pod: Pod, body: Any, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any], str | None]:
    """Status, JSON and Retry-After."""
    data = body if isinstance(body, str) else json.dumps(body)
    async with pod.http.post(pod.url(path, names.PUBLIC_PORT), data=io.BytesIO(data.encode())) as response:
        return response.status, await response.json(), response.headers.get("Retry-After")


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


async def kill_engine(pod: Pod, number: signal.Signals = signal.SIGKILL) -> None:
    for engine in pod.engines():
        os.kill(engine, number)


async def events(pod: Pod, body: Any, lines: list[str]) -> None:
    """Everything of a stream, line by line."""
    url = pod.url("/v1/chat/completions", names.PUBLIC_PORT)
    async with pod.http.post(url, json={**body, "stream": True}) as response:
        assert response.status == 200
        async for raw in response.content:
            if line := raw.decode().strip():
                lines.append(line)


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def text_of(lines: list[str]) -> str:
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


async def test_a_stream_pauses_while_the_group_restarts_and_goes_on_where_it_was(instance: Group) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=1000, token_seconds=0.05)
    await instance.ready()
    lines: list[str] = []
    body = {**CHAT, "stream_options": {"include_usage": True}}
    streaming = asyncio.create_task(events(pod, body, lines))
    await until(lambda: len(lines) >= 3, "three events")
    await kill_engine(pod)
    await pod.state(S.FAILED, 1)
    comments = ": the group restarts, "
    await until(lambda: sum(line.startswith(comments) for line in lines) >= 2, "life while it waits")
    given = len([line for line in lines if line.startswith("data: ")]) - 1
    assert lines[-1] == f"{comments}{given} tokens given so far"
    pod.plan(tokens=30)
    await instance.ready(2)
    await streaming
    assert lines[-1] == "data: [DONE]"
    assert not any("error" in line for line in lines)
    expected = [ANSWER[index % len(ANSWER)] for index in range(30)]
    assert text_of(lines) == " ".join(expected)
    usage = json.loads(lines[-2].removeprefix("data: "))["usage"]
    assert usage["completion_tokens"] == 30, "each token counts once"
    await metric(pod, "mlx_runner_requests_resumed_total 1.0")
    await metric(pod, 'mlx_runner_restarts_total{reason="EngineCrashed"} 1.0')
    await metric(pod, "mlx_runner_generation_tokens_total 30.0")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGABRT])
async def test_the_official_client_notices_nothing_but_the_pause(instance: Group, number: signal.Signals) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=1000, token_seconds=0.05)
    await instance.ready()
    async with client(instance) as ai:
        whole = asyncio.create_task(ai.chat.completions.create(model="tiny", messages=HELLO))
        stream = await ai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
        parts = [await anext(stream), await anext(stream)]
        await metric(pod, "mlx_runner_num_requests_running 2.0")
        await kill_engine(pod, number)
        await pod.state(S.FAILED, 1)
        pod.plan()
        await instance.ready(2)
        parts += [part async for part in stream]
        assert "".join(part.choices[0].delta.content or "" for part in parts) == TEXT
        assert (await whole).choices[0].message.content == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_what_no_epoch_goes_on_with_in_time_ends_honestly(instance: Group, stream: bool) -> None:
    pod = instance.pods[0]
    instance.deadlines = DeadlineSeconds(resume=1.0)
    pod.plan(tokens=1000, token_seconds=0.05)
    await instance.ready()
    lines: list[str] = []
    asked = asyncio.create_task(events(pod, CHAT, lines) if stream else post(pod, CHAT))
    await metric(pod, "mlx_runner_time_to_first_token_seconds_count 1.0")
    await kill_engine(pod)
    told = await asked
    if told is None:
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert "data: [DONE]" not in lines
    else:
        status, answer, retry = told
        error = answer["error"]
        assert (status, retry is not None) == (503, True)
    assert error["code"] == "runner_failed"
    assert "engine killed by signal 9 (SIGKILL) in RunnerRunning" in error["message"]
    assert error["message"].endswith("the model did not become ready again within 1 s")
    await metric(pod, 'mlx_runner_requests_total{outcome="lost"} 1.0')


async def test_a_request_that_makes_engines_abort_is_refused_and_takes_no_other_with_it(instance: Group) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=100, token_seconds=0.1, abort="deadly")
    await instance.ready()
    lines: list[list[str]] = [[] for _ in range(3)]
    streams = [asyncio.create_task(events(pod, CHAT, each)) for each in lines]
    await until(lambda: all(len(each) >= 3 for each in lines), "three streams")
    deadly = asyncio.create_task(post(pod, {**CHAT, "messages": [{"role": "user", "content": "deadly words"}]}))
    for epoch in (1, 2):
        await pod.state(S.FAILED, epoch)
        await instance.ready(epoch + 1)
    status, answer, retry = await deadly
    assert (status, answer["error"]["code"], retry) == (500, "request_crashes_engine", None)
    assert "SIGABRT" in answer["error"]["message"]
    pod.plan(tokens=100)
    await asyncio.gather(*streams)
    for each in lines:
        assert each[-1] == "data: [DONE]"
        assert text_of(each) == " ".join(ANSWER[index % len(ANSWER)] for index in range(100))
    assert "a request is taken for the cause of 2 deaths of the engine: " in pod.log
    assert "len(messages)=1" in pod.log
    assert "deadly words" not in pod.log
    await metric(pod, 'mlx_runner_requests_total{outcome="crashes_engine"} 1.0')
    assert pod.report.epoch == 3


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
async def test_a_request_that_makes_the_engine_of_another_rank_abort_is_found_out_too(
    tmp_path: Path, number: signal.Signals
) -> None:
    async with group(tmp_path, 2) as instance:
        first, worker = instance.pods
        await instance.ready()
        first.plan(hang="Generate")
        asked = asyncio.create_task(post(first, CHAT))
        for epoch in (1, 2):
            await first.state(S.RUNNING, epoch)
            for engine in worker.engines():
                os.kill(engine, number)
            lost = await first.state(S.FAILED, epoch)
            assert lost.failure is not None and lost.failure.reason is Reason.PEER_LOST
            await worker.state(S.FAILED, epoch)
            # What the operator found out, and this rank cannot know.
            instance.cause = GroupCause(epoch=epoch, rank=1, reason=Reason.ENGINE_CRASHED, signal=number.name)
            first.plan(**({"hang": "Generate"} if epoch == 1 else {}))
            await instance.ready(epoch + 1)
        status, answer, _ = await asked
        if number == signal.SIGKILL:
            assert (status, answer["choices"][0]["message"]["content"]) == (200, TEXT)
        else:
            assert (status, answer["error"]["code"]) == (500, "request_crashes_engine")


async def test_requests_are_held_between_two_epochs(instance: Group) -> None:
    pod = instance.pods[0]
    await instance.ready()
    await kill_engine(pod)
    await pod.state(S.FAILED, 1)
    held = asyncio.create_task(post(pod, CHAT))
    assert await pod.status("/readyz", names.PUBLIC_PORT) == 200, "a restart in place keeps the endpoint"
    assert await pod.status("/readyz") == 200
    await instance.ready(2)
    status, answer, _ = await held
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_a_dead_engine_had_not_begun_is_answered_by_the_next_one(
    instance: Group, stream: bool
) -> None:
    pod = instance.pods[0]
    await instance.ready()
    pod.plan(hang="Generate")
    async with client(instance) as ai:
        asked = asyncio.create_task(
            ai.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, stream=stream)
        )
        await pod.state(S.RUNNING, 1)
        await kill_engine(pod)
        await pod.state(S.FAILED, 1)
        pod.plan()
        await instance.ready(2)
        answer = await asked
        if isinstance(answer, openai.AsyncStream):
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
        else:
            text = answer.choices[0].message.content or ""
    assert text == " ".join(ANSWER[:2])


@pytest.mark.parametrize("step", ["load", "download"])
async def test_a_failure_that_no_restart_follows_holds_nobody(instance: Group, tmp_path: Path, step: str) -> None:
    pod = instance.pods[0]
    await instance.ready()
    await kill_engine(pod)
    await pod.state(S.FAILED, 1)
    held = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_num_requests_waiting 1.0")
    await instance.create(2)
    if step == "download":
        (tmp_path / "models/tiny/config.json").write_text("{")
        await pod.send(DownloadModel(), 2)
    else:
        pod.plan(fail={"on": "Load", "reason": "InsufficientMemory", "message": "the shard needs 9Gi"})
        await instance.download(2)
        await pod.send(LoadModel(), 2)
    for answer in (await held, await post(pod, CHAT)):
        assert (answer[0], answer[1]["error"]["code"]) == (503, "not_ready")
        assert answer[1]["error"]["message"].startswith("the model has failed and is not started again by itself: ")
    assert await pod.status("/readyz", names.PUBLIC_PORT) == 503
    assert await pod.status("/readyz") == 503


async def test_a_shutdown_for_a_restart_holds_requests_as_a_failure_does(instance: Group) -> None:
    pod = instance.pods[0]
    await instance.ready()
    await instance.shut_down()
    assert await pod.status("/readyz", names.PUBLIC_PORT) == 200
    held = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_num_requests_waiting 1.0")
    await instance.ready(2)
    status, _, _ = await held
    assert status == 200


async def test_a_planned_shutdown_lets_requests_finish_and_the_next_epoch_goes_on_with_the_others(
    instance: Group,
) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=10, token_seconds=0.1)
    await instance.ready()
    quick = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_num_requests_running 1.0")
    pod.plan(tokens=10_000, token_seconds=0.05)
    lines: list[str] = []
    endless = asyncio.create_task(events(pod, CHAT, lines))
    await until(lambda: len(lines) >= 3, "three events")
    await instance.shut_down(grace=2.0)
    status, answer, _ = await quick
    assert (status, answer["usage"]["completion_tokens"]) == (200, 10)
    pod.plan(tokens=200)
    await instance.ready(2)
    await endless
    assert lines[-1] == "data: [DONE]"
    assert text_of(lines) == " ".join(ANSWER[index % len(ANSWER)] for index in range(200))


async def test_the_last_shutdown_of_a_group_holds_nobody(instance: Group) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=10_000, token_seconds=0.05)
    await instance.ready()
    running = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_time_to_first_token_seconds_count 1.0")
    await kill_engine(pod)
    await pod.state(S.FAILED, 1)
    held = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_num_requests_waiting 2.0")
    await pod.send(Shutdown(final=True))
    given_up = "the model has failed and is not started again by itself: see the instance's status"
    status, answer, retry = await running
    assert (status, answer["error"]["code"], retry is not None) == (503, "runner_failed", True)
    assert given_up in answer["error"]["message"]
    for told in (await held, await post(pod, CHAT)):
        assert (told[0], told[1]["error"]["message"]) == (503, given_up)
    assert pod.report.state is S.FAILED, "a failure keeps its evidence"
    pod.plan()
    await instance.ready(2)
    assert (await post(pod, CHAT))[0] == 200


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


async def metric(pod: Pod, line: str) -> None:
    """Wait until /metrics has a line."""
    deadline = time.monotonic() + PATIENCE
    while True:
        async with pod.http.get(pod.url("/metrics")) as response:
            text = await response.text()
        if line in text.splitlines():
            return
        assert time.monotonic() < deadline, text
        await asyncio.sleep(0.05)


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


async def value(pod: Pod, name: str) -> float:
    async with pod.http.get(pod.url("/metrics")) as response:
        lines = (await response.text()).splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)


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


async def test_a_draining_runner_finishes_what_runs_and_refuses_the_rest(instance: Group) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=20, token_seconds=0.1)
    await instance.ready()
    running = asyncio.create_task(post(pod, CHAT))
    await pod.state(S.RUNNING, 1)
    os.kill(pod.pid, signal.SIGTERM)
    await pod.until(lambda r: r.draining, "draining")
    async with pod.http.post(pod.url("/v1/chat/completions", names.PUBLIC_PORT), json=CHAT) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "not_ready")
        assert int(response.headers["Retry-After"]) > 0
        assert response.headers["Connection"] == "close"
    assert await pod.status("/readyz") == 503
    status, answer, _ = await running
    assert (status, answer["usage"]["completion_tokens"]) == (200, 20)
    assert await pod.exit_code() == 0


async def test_a_drain_longer_than_its_grace_ends_the_request_honestly(tmp_path: Path) -> None:
    async with group(tmp_path, 1, MLX_RUNNER_GRACE_SECONDS="6") as instance:
        pod = instance.pods[0]
        pod.plan(tokens=100_000, token_seconds=0.1)
        await instance.ready()
        running = asyncio.create_task(post(pod, CHAT))
        await pod.state(S.RUNNING, 1)
        os.kill(pod.pid, signal.SIGTERM)
        status, answer, _ = await running
        assert (status, answer["error"]["code"]) == (503, "runner_failed")
        assert await pod.exit_code() == 0


async def test_a_drain_ends_at_once_what_waits_for_the_next_epoch(instance: Group) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=1000, token_seconds=0.05)
    await instance.ready()
    lines: list[str] = []
    paused = asyncio.create_task(events(pod, CHAT, lines))
    whole = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_time_to_first_token_seconds_count 2.0")
    await kill_engine(pod)
    await pod.state(S.FAILED, 1)
    held = asyncio.create_task(post(pod, CHAT))
    await metric(pod, "mlx_runner_num_requests_waiting 3.0")
    os.kill(pod.pid, signal.SIGTERM)
    await paused
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "runner_failed"
    assert error["message"].endswith("the runner is shutting down")
    for told, code in ((await whole, "runner_failed"), (await held, "not_ready")):
        assert (told[0], told[1]["error"]["code"], told[2] is not None) == (503, code, True)
    assert await pod.exit_code() == 0


async def test_a_worker_keeps_serving_until_rank_0_says_goodbye(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        first, worker = instance.pods
        first.plan(tokens=20, token_seconds=0.1)
        await instance.ready()
        running = asyncio.create_task(post(first, CHAT))
        await first.state(S.RUNNING, 1)
        for pod in (worker, first):
            os.kill(pod.pid, signal.SIGTERM)
        status, answer, _ = await running
        assert (status, answer["usage"]["completion_tokens"]) == (200, 20)
        for pod in instance.pods:
            assert await pod.exit_code() == 0
            assert all(r.failure is None for r in pod.reports)


async def test_only_rank_0_has_a_public_api_and_workers_are_ready_when_their_engine_is(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        worker = instance.pods[1]
        assert await worker.status("/readyz") == 503
        await instance.ready()
        assert await worker.status("/readyz") == 200
        with pytest.raises(aiohttp.ClientConnectorError):
            await worker.status("/healthz", names.PUBLIC_PORT)
