"""What clients notice of the operator's restarts: a pause, or an honest end."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType
from tests.apiserver.harness import Manifest, World, again_in, condition, eventually
from tests.runner.fake_engine import ANSWER

TOKENS = 500


class Stream:
    """A client's stream of rank 0."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def read(self, ip: str) -> None:
        body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        url = f"http://{ip}:{names.PUBLIC_PORT}/v1/chat/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
            assert response.status == 200
            async for raw in response.content:
                if line := raw.decode().strip():
                    self.lines.append(line)

    async def moves(self) -> None:
        """Wait for events from now on."""
        seen = len([line for line in self.lines if line.startswith("data: ")])

        async def moved() -> bool:
            return len([line for line in self.lines if line.startswith("data: ")]) >= seen + 3

        await eventually(moved, "the stream goes on", 40)

    @property
    def last(self) -> str:
        return self.lines[-1].removeprefix("data: ")

    @property
    def text(self) -> str:
        chunks = [json.loads(line.removeprefix("data: ")) for line in self.lines if line.startswith("data: {")]
        return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


@asynccontextmanager
async def streaming(place: World) -> AsyncIterator[tuple[Stream, "asyncio.Task[None]"]]:
    """A client of a group that is Ready; it has had its first words."""
    place.kubelet.engine_plan.write_text(json.dumps({"tokens": TOKENS, "token_seconds": 0.02}))
    await place.until_ready()
    stream = Stream()
    reading = asyncio.create_task(stream.read(place.kubelet.of("tiny-0").ip))
    try:
        await stream.moves()
        yield stream, reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def whole(stream: Stream) -> bool:
    return stream.last == "[DONE]" and stream.text == " ".join(ANSWER[i % len(ANSWER)] for i in range(TOKENS))


async def test_a_stream_outlives_killed_engines_of_either_rank(place: World) -> None:
    await place.operator()
    await place.create()
    async with streaming(place) as (stream, reading):
        for epoch, name in ((1, "tiny-1"), (2, "tiny-0")):
            place.kubelet.kill_engine(name)
            await place.until(again_in(epoch + 1), f"Ready again in epoch {epoch + 1}")
            await stream.moves()
        await asyncio.wait_for(reading, 60)
        assert whole(stream), stream.lines[-3:]


async def test_a_planned_restart_goes_on_with_what_its_grace_did_not_suffice_for(place: World) -> None:
    await place.operator()
    await place.create(deadlines={"shutdown": "1s"})
    async with streaming(place) as (stream, reading):
        await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": {"serving": {"maxQueue": 3}}})
        await place.until(again_in(2), "Ready again in epoch 2")
        await stream.moves()
        await asyncio.wait_for(reading, 60)
        assert whole(stream), stream.lines[-3:]


async def test_clients_of_a_group_that_is_given_up_hear_it_at_once(place: World) -> None:
    await place.operator()
    await place.create(restartPolicy={"maxRestarts": 0}, deadlines={"resume": "10m"})

    def stalled(instance: Manifest) -> bool:
        return condition(instance, ConditionType.STALLED).get("status") == "True"

    async with streaming(place) as (stream, reading):
        place.kubelet.kill_engine("tiny-1")
        await place.until(stalled, "Stalled")
        began = time.monotonic()
        await asyncio.wait_for(reading, 60)
        assert time.monotonic() - began < 30, "it waited for an epoch that never comes"
        error = json.loads(stream.last)["error"]
        assert error["code"] == "runner_failed"
        assert "is not started again by itself" in error["message"]
