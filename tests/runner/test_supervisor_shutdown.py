"""Requests at a planned end: of an epoch, of the group, of the pod. The engine is the fake one."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from mlx_operator_api import names
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import (
    Shutdown,
)

from .api_clients import CHAT, events, kill_engine, metric, post, text_of, until
from .fake_engine import ANSWER
from .supervisors import Group, group

S = RunnerState


@pytest.fixture
async def instance(tmp_path: Path) -> AsyncIterator[Group]:
    async with group(tmp_path, 1) as served:
        yield served


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
    await metric(pod, "mlx_runner_time_to_first_token_seconds_count 1.0")  # the engine has read its plan
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


async def test_a_drain_in_a_planned_shutdown_keeps_the_grace_that_was_promised(instance: Group) -> None:
    pod = instance.pods[0]
    pod.plan(tokens=20, token_seconds=0.1)
    await instance.ready()
    lines: list[str] = []
    running = asyncio.create_task(events(pod, CHAT, lines))
    await until(lambda: len(lines) >= 3, "three events")
    await pod.send(Shutdown(grace_seconds=20.0))
    await pod.state(S.SHUTTING_DOWN, 1)
    os.kill(pod.pid, signal.SIGTERM)
    await running
    assert lines[-1] == "data: [DONE]"
    assert text_of(lines) == " ".join(ANSWER[index % len(ANSWER)] for index in range(20))
    assert await pod.exit_code() == 0
    assert pod.report.state is S.SHUTDOWN


@pytest.mark.parametrize(("planned", "pods"), [(1.0, 60.0), (60.0, 6.0)], ids=["of the task", "of the pod"])
async def test_a_drain_in_a_planned_shutdown_ends_with_the_shorter_grace(
    tmp_path: Path, planned: float, pods: float
) -> None:
    async with group(tmp_path, 1, MLX_RUNNER_GRACE_SECONDS=f"{pods:g}") as instance:
        pod = instance.pods[0]
        pod.plan(tokens=100_000, token_seconds=0.1)
        await instance.ready()
        running = asyncio.create_task(post(pod, CHAT))
        await pod.state(S.RUNNING, 1)
        await pod.send(Shutdown(grace_seconds=planned))
        os.kill(pod.pid, signal.SIGTERM)
        began = time.monotonic()
        status, answer, _ = await running
        assert (status, answer["error"]["code"]) == (503, "runner_failed")
        assert await pod.exit_code() == 0
        assert time.monotonic() - began < 20.0
        assert pod.report.state is S.SHUTDOWN


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


@pytest.mark.parametrize(("tokens", "seconds"), [(20, 0.1), (2, 7.0)], ids=["busy", "waiting for a slow rank"])
async def test_a_worker_keeps_serving_until_rank_0_says_goodbye(tmp_path: Path, tokens: int, seconds: float) -> None:
    async with group(tmp_path, 2) as instance:
        first, worker = instance.pods
        first.plan(tokens=tokens, token_seconds=seconds)
        await instance.ready()
        running = asyncio.create_task(post(first, CHAT))
        await first.state(S.RUNNING, 1)
        for pod in (worker, first):
            os.kill(pod.pid, signal.SIGTERM)
        status, answer, _ = await running
        assert (status, answer["usage"]["completion_tokens"]) == (200, tokens)
        for pod in instance.pods:
            assert await pod.exit_code() == 0
            assert all(r.failure is None for r in pod.reports)


async def test_a_worker_that_waits_for_a_rank_0_that_is_gone_ends(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        first, worker = instance.pods
        first.plan(tokens=100_000, token_seconds=0.05)
        await instance.ready()
        running = asyncio.create_task(post(first, CHAT))
        await first.state(S.RUNNING, 1)
        os.kill(worker.pid, signal.SIGTERM)
        await worker.until(lambda r: r.draining, "draining")
        first.kill_whole()
        with pytest.raises(aiohttp.ClientError):
            await running
        assert await worker.exit_code() == 0
