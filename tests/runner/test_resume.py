"""Answers outlive their engines: token for token, and character for character, what an undisturbed run gives."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api import names
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import Sharding
from mlx_runner import channel

from . import tiny_models
from .conftest import PROMPTS, TOKENS
from .engine_ranks import Answer, Rank, Ranks, generate
from .supervisors import PATIENCE, Group, group
from .test_supervisor_with_engine import ENVIRONMENT

S = RunnerState
STREAMS = 8
LENGTH = 600
PROGRESS = 60
"""Events of the slowest stream between two kills."""


# -- the engine
@pytest.fixture(params=["single", "pipeline", "tensor"])
def leader(request: pytest.FixtureRequest) -> Rank:
    ranks: Ranks = request.getfixturevalue(request.param)
    return ranks[0]


def undisturbed(leader: Rank, name: str, **options: Any) -> tuple[Answer, list[channel.Delta]]:
    leader.send(generate(name, PROMPTS[0], TOKENS, **options))
    answer = leader.answer(name)
    return answer, [event for event in leader.seen if isinstance(event, channel.Delta) and event.id == name]


def cut_everywhere(leader: Rank, name: str, **options: Any) -> Answer:
    """Ask once undisturbed, then resumed after each of its tokens, all at once; they must be equal."""
    whole, deltas = undisturbed(leader, name, **options)
    cuts = range(1, len(deltas) + 1)
    for cut in cuts:
        given = tuple(token for delta in deltas[:cut] for token in delta.tokens)
        leader.send(generate(f"{name}-{cut}", PROMPTS[0], TOKENS, resume=given, **options))
    for cut in cuts:
        rest = leader.answer(f"{name}-{cut}")
        before = "".join(delta.text for delta in deltas[:cut])
        given = tuple(token for delta in deltas[:cut] for token in delta.tokens)
        assert [*given, *rest.tokens] == whole.tokens, f"cut after {cut} tokens"
        assert before + rest.text == whole.text, f"cut after {cut} tokens"
        assert rest.finished is not None and whole.finished is not None
        # How much of a prompt is computed again may differ: nobody sees it but in the count.
        assert rest.finished.cached_tokens <= rest.finished.prompt_tokens
        same = {"id": name, "cached_tokens": whole.finished.cached_tokens}
        assert rest.finished.model_copy(update=same) == whole.finished
    return whole


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 7}, {"temperature": 1.2, "top_p": 0.8}])
def test_an_answer_cut_anywhere_goes_on_token_for_token(leader: Rank, options: dict[str, Any]) -> None:
    whole = cut_everywhere(leader, f"cut-{len(options)}", **options)
    assert len(whole.tokens) == TOKENS


def test_a_stop_string_and_a_character_of_many_bytes_may_lie_across_the_cut(leader: Rank) -> None:
    for seed in range(500):
        answer, deltas = undisturbed(leader, f"look-{seed}", temperature=1.5, seed=seed)
        later = answer.text[8:]
        wide = next((character for character in later if character > "\x7f" and character != "\ufffd"), None)
        if wide is not None and any(not delta.text for delta in deltas):
            break
    else:
        raise AssertionError("no answer has a character of several bytes")
    at = answer.text.index(wide)
    stop = answer.text[at - 2 : at + 2]
    free = cut_everywhere(leader, "cut-wide", temperature=1.5, seed=seed)
    assert wide in free.text
    stopped = cut_everywhere(leader, "cut-stopped", temperature=1.5, seed=seed, stop=(stop,))
    assert stopped.text == answer.text[: answer.text.index(stop)]
    assert stopped.finished is not None and stopped.finished.finish_reason == "stop"


# -- the whole group
@dataclass(slots=True)
class Stream:
    """A client's stream."""

    body: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None

    async def read(self, instance: Group) -> "Stream":
        pod = instance.pods[0]
        body = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}, **self.body}
        async with pod.http.post(pod.url("/v1/completions", names.PUBLIC_PORT), json=body) as response:
            assert response.status == 200
            async for raw in response.content:
                if line := raw.decode().strip():
                    self.lines.append(line)
        return self

    def start(self, instance: Group) -> "Stream":
        async def read() -> None:
            await self.read(instance)

        self.task = asyncio.create_task(read())
        return self

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(line.removeprefix("data: ")) for line in self.lines if line.startswith("data: {")]

    @property
    def answer(self) -> tuple[str, str | None, dict[str, int]]:
        """Text, finish reason and usage."""
        assert self.lines[-1] == "data: [DONE]", self.lines[-1]
        choices = [choice for chunk in self.chunks for choice in chunk["choices"]]
        counted = ("prompt_tokens", "completion_tokens", "total_tokens")
        usage: dict[str, int] = {name: self.chunks[-1]["usage"][name] for name in counted}
        return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"], usage


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tiny_models.build(directory / "tiny", "qwen2")
    return directory


@pytest.fixture
async def pair(tmp_path: Path, models: Path) -> AsyncIterator[Group]:
    async with group(tmp_path, 2, engine=None, models=models, **ENVIRONMENT) as instance:
        yield instance


async def until_given(streams: Sequence[Stream], events: int) -> None:
    """Wait until every stream has had so many events; none of them may be done by then."""
    deadline = time.monotonic() + PATIENCE
    while min(len(stream.chunks) for stream in streams) < events:
        assert time.monotonic() < deadline, [len(stream.chunks) for stream in streams]
        await asyncio.sleep(0.01)
    assert not any(stream.task and stream.task.done() for stream in streams), "too fast for this test"


async def restart(instance: Group, rank: int, epoch: int) -> None:
    """Kill a rank's engine; then do what the operator does."""
    for engine in instance.pods[rank].engines():
        os.kill(engine, signal.SIGKILL)
    for pod in instance.pods:
        await pod.state(S.FAILED, epoch)
    await instance.ready(epoch + 1)


async def long_answers(instance: Group) -> list[Stream]:
    """Undisturbed streams that use up all their tokens; half greedy, half drawn with a seed."""

    def body(number: int) -> dict[str, Any]:
        prompt = [(number * 31 + index * 7) % 380 + 3 for index in range(4 + number)]
        drawn = {"temperature": 1.1, "seed": number, "top_p": 0.95}
        return {"prompt": prompt, "max_tokens": LENGTH, **({"temperature": 0} if number % 2 else drawn)}

    found: dict[bool, list[Stream]] = {True: [], False: []}
    for first in range(0, 64, STREAMS):
        streams = await asyncio.gather(*(Stream(body(n)).read(instance) for n in range(first, first + STREAMS)))
        for stream in streams:
            if stream.answer[1] == "length":
                found[stream.body["temperature"] == 0].append(stream)
        if min(len(streams) for streams in found.values()) >= STREAMS // 2:
            return [stream for kind in found.values() for stream in kind[: STREAMS // 2]]
    raise AssertionError("the answers of this model are too short")


async def test_eight_streams_end_as_if_nobody_had_killed_three_engines(pair: Group) -> None:
    await pair.ready()
    expected = await long_answers(pair)
    streams = [Stream(stream.body).start(pair) for stream in expected]
    for epoch, rank in ((1, 1), (2, 0), (3, 1)):
        await until_given(streams, epoch * PROGRESS)
        await restart(pair, rank, epoch)
    await asyncio.gather(*(stream.task for stream in streams if stream.task))
    for stream, undisturbed_ in zip(streams, expected, strict=True):
        assert stream.answer == undisturbed_.answer
        assert any(line.startswith(": the group restarts, ") for line in stream.lines)
    assert not any("error" in chunk for stream in streams for chunk in stream.chunks)


async def test_a_tensor_group_goes_on_too(pair: Group) -> None:
    pair.sharding = Sharding.TENSOR
    await pair.ready()
    (first, *_) = await long_answers(pair)
    streaming = Stream(first.body).start(pair)
    await until_given([streaming], PROGRESS)
    await restart(pair, 1, 1)
    assert streaming.task is not None
    await streaming.task
    assert streaming.answer == first.answer
