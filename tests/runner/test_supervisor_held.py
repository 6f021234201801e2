"""Requests that outlive an engine, as clients see it. The engine is the fake one."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

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
)

from .api_clients import CHAT, HELLO, TEXT, client, events, kill_engine, metric, post, text_of, until
from .fake_engine import ANSWER
from .supervisors import Group, group

S = RunnerState


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Group]:
    async with group(tmp_path, 1) as served:
        yield served


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
