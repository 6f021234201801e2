"""Real supervisors with the real engine: the lifecycle, answers, a killed engine, the next epoch in place."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import ServingOptions, Sharding

from . import tiny_models
from .supervisors import PATIENCE, Group, group

S = RunnerState
QUESTION = "the runner holds one shard"
TOKENS = 24
BLAS = next(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0"), None)
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", **({"MLX_RUNNER_BLAS": str(BLAS)} if BLAS else {})}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tiny_models.build(directory / "tiny", "qwen2")
    return directory


async def complete(instance: Group, *, stream: bool = False, tokens: int = TOKENS) -> str:
    """A greedy answer."""
    client = openai.AsyncOpenAI(base_url=instance.base_url, api_key="x", max_retries=0, timeout=PATIENCE)
    async with client as ai:
        if not stream:
            answer = await ai.completions.create(model="tiny", prompt=QUESTION, max_tokens=tokens, temperature=0)
            return str(answer.choices[0].text)
        parts = await ai.completions.create(
            model="tiny", prompt=QUESTION, max_tokens=tokens, temperature=0, stream=True
        )
        return "".join([part.choices[0].text async for part in parts])


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one rank answers: the reference for every group."""

    async def ask() -> str:
        async with group(tmp_path_factory.mktemp("alone"), 1, engine=None, models=models, **ENVIRONMENT) as instance:
            await instance.ready()
            answer = await complete(instance)
            assert await complete(instance, stream=True) == answer
            return answer

    return asyncio.run(ask())


@pytest.fixture(params=list(Sharding))
async def pair(request: pytest.FixtureRequest, tmp_path: Path, models: Path) -> AsyncIterator[Group]:
    async with group(tmp_path, 2, engine=None, models=models, **ENVIRONMENT) as instance:
        instance.sharding = request.param
        yield instance


async def test_two_ranks_answer_as_one_and_again_after_an_engine_was_killed(pair: Group, alone: str) -> None:
    assert len(alone) >= TOKENS / 2
    await pair.ready()
    assert await complete(pair) == alone
    assert await complete(pair, stream=True) == alone
    for pod in pair.pods:
        assert pod.report.layers_loaded == pod.report.layers_total > 0
    assert {S.RUNNING, S.READY} <= {r.state for r in pair.pods[0].reports}

    (engine,) = pair.pods[1].engines()
    os.kill(engine, signal.SIGKILL)
    killed = await pair.pods[1].state(S.FAILED, 1)
    assert killed.failure is not None
    assert (killed.failure.reason, killed.failure.signal) == (Reason.ENGINE_CRASHED, "SIGKILL")
    lost = await pair.pods[0].state(S.FAILED, 1)
    assert lost.failure is not None
    assert (lost.failure.reason, lost.peer) == (Reason.PEER_LOST, 1)

    held = asyncio.create_task(complete(pair))
    await pair.ready(2)
    assert await held == alone
    for pod in pair.pods:
        assert len(pod.engines()) == 1


async def test_ranks_of_unequal_memory_hold_unequal_parts_and_answer_the_same(
    tmp_path: Path, models: Path, alone: str
) -> None:
    async with group(tmp_path, 2, engine=None, models=models, **ENVIRONMENT) as instance:
        instance.memory_limits = (1 << 30, 3 << 30)
        await instance.ready()
        assert [pod.report.layers for pod in instance.pods] == ["3-3", "0-2"]
        assert await complete(instance) == alone


async def test_a_chat_goes_through_the_template_of_the_model(pair: Group) -> None:
    await pair.ready()
    async with openai.AsyncOpenAI(base_url=pair.base_url, api_key="x", max_retries=0, timeout=PATIENCE) as ai:
        answer = await ai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5, seed=1
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 5
        assert answer.usage.prompt_tokens > len("hello") // 5
        parts = await ai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5, seed=1, stream=True
        )
        text = "".join([p.choices[0].delta.content or "" async for p in parts])
        assert text == answer.choices[0].message.content, "the same seed, the same answer"


async def test_what_a_prompt_shares_with_an_earlier_one_is_counted_as_cached(pair: Group) -> None:
    pair.serving = ServingOptions(prompt_cache_bytes=1024 * 1024)
    await pair.ready()
    async with openai.AsyncOpenAI(base_url=pair.base_url, api_key="x", max_retries=0, timeout=PATIENCE) as ai:
        usages = []
        for _ in range(2):
            answer = await ai.completions.create(model="tiny", prompt=QUESTION * 9, max_tokens=3, temperature=0)
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            usages.append((answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens))
    (asked, before), again = usages
    assert before == 0
    assert again == (asked, asked - 1), "only the last token is computed again"
    assert "prompts are reused" in pair.pods[0].log


async def test_a_restart_is_told_what_the_first_warm_up_measured(tmp_path: Path, models: Path) -> None:
    async with group(tmp_path, 2, engine=None, models=models, **ENVIRONMENT) as instance:
        leader, steps = instance.pods[0], []
        for epoch in (1, 2):
            await instance.ready(epoch)
            await leader.until(lambda r, epoch=epoch: r.epoch == epoch and r.steps > 0, "a heartbeat")  # type: ignore[misc]
            steps.append(leader.report.steps)
            await instance.shut_down(epoch)
        found = re.findall("two lanes from ([0-9]+) requests on", leader.log)
        assert len(found) == 2 and found[0] == found[1]
        assert steps[1] < 10 < steps[0], "it was measured again"


async def test_deleted_pods_leave_in_good_order(pair: Group) -> None:
    await pair.ready()
    for pod in pair.pods:
        os.kill(pod.pid, signal.SIGTERM)
    for pod in pair.pods:
        assert await pod.exit_code() == 0
        assert pod.report.state is S.SHUTDOWN
        assert all(r.failure is None for r in pod.reports)
