"""The measurements, each taken from both servers in turn."""

import asyncio
import math
import statistics
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from . import load
from .model import Prompts
from .servers import Server, cpu_seconds

_T = TypeVar("_T")
SETTLE_SECONDS = 2.0
"""After work, before idle CPU is taken: an idle engine gives memory back a second later."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how often."""

    concurrencies: tuple[int, ...]
    rounds: int
    prompt: int
    """Tokens of a prompt."""
    answer: int
    """Tokens of an answer."""
    long: int
    """Tokens of the prompt that a late short request finds in its way."""
    least: int = 64
    """Tokens of a round: where few requests run at once, they are asked several times, one after the other."""
    late_after: float = 0.3
    """Seconds between the long prompt and the late short request."""
    late_beside: int = 4
    """Answers under way meanwhile."""
    idle: float = 4.0
    """Seconds over which idle CPU is taken."""


@dataclass(slots=True)
class Figures:
    """Of one server in one shape."""

    samples: dict[int, list[load.Sample]] = field(default_factory=dict)
    busy: dict[int, float] = field(default_factory=dict)
    """CPU seconds of all ranks, by concurrency."""
    late: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    """Cores of each rank."""

    def speed(self, concurrency: int) -> float:
        """Tokens a second: the median round."""
        return statistics.median(sample.tokens_per_second for sample in self.samples[concurrency])

    def cost(self, concurrency: int) -> float:
        """CPU milliseconds of all ranks per token: less moved by what else the machine does."""
        tokens = sum(stream.tokens for sample in self.samples[concurrency] for stream in sample.streams)
        return self.busy[concurrency] / tokens * 1e3

    def first(self, concurrency: int, percent: float) -> float:
        """Milliseconds to the first text, a percentile over all requests of all rounds."""
        every = sorted(stream.first for sample in self.samples[concurrency] for stream in sample.streams)
        return every[min(len(every) - 1, int(len(every) * percent / 100))] * 1e3

    def texts(self, concurrency: int) -> list[str]:
        """All answers, in the order of the prompts."""
        return [stream.text for sample in self.samples[concurrency] for stream in sample.streams]


def _turns(servers: Sequence[Server], plan: Plan) -> Iterator[tuple[int, list[int]]]:
    """Rounds, with the order of the servers changing: neither always follows the other."""
    for number in range(plan.rounds):
        yield number, [number % 2, 1 - number % 2][: len(servers)]


async def everything(servers: Sequence[Server], prompts: Prompts, plan: Plan) -> list[Figures]:
    """Figures of each server."""
    figures = [Figures() for _ in servers]
    for server in servers:
        await _alone(server, load.together(server.url, server.model, [prompts.make(plan.prompt)], 4))
    for concurrency in plan.concurrencies:
        await _throughput(servers, figures, prompts, plan, concurrency)
    print("  a late short request …", flush=True)
    await _late(servers, figures, prompts, plan)
    print("  at rest …", flush=True)
    for server, mine in zip(servers, figures, strict=True):
        server.go_on()
        mine.idle = await _idle(server, plan.idle)
        server.pause()
    return figures


async def _throughput(
    servers: Sequence[Server], figures: list[Figures], prompts: Prompts, plan: Plan, concurrency: int
) -> None:
    times = math.ceil(plan.least / (plan.answer * concurrency))
    for number, order in _turns(servers, plan):
        texts = [[prompts.make(plan.prompt) for _ in range(concurrency)] for _ in range(times)]
        for at in order:
            server, mine = servers[at], figures[at]
            before = sum(cpu_seconds(pids) for pids in server.ranks())
            sample = await _alone(server, load.in_turn(server.url, server.model, texts, plan.answer))
            mine.busy[concurrency] = (
                mine.busy.get(concurrency, 0.0) + sum(cpu_seconds(pids) for pids in server.ranks()) - before
            )
            mine.samples.setdefault(concurrency, []).append(sample)
            what = f"concurrency {concurrency}, round {number + 1} of {plan.rounds}"
            print(f"  {what}: {server.name} {sample.tokens_per_second:.1f} tokens/s", flush=True)


async def _late(servers: Sequence[Server], figures: list[Figures], prompts: Prompts, plan: Plan) -> None:
    for _, order in _turns(servers, plan):
        others = [prompts.make(plan.prompt) for _ in range(plan.late_beside)]
        long, short = prompts.make(plan.long), prompts.make(6)
        for at in order:
            server = servers[at]
            stream = await _alone(server, load.late(server.url, server.model, others, long, short, plan.late_after))
            figures[at].late.append(stream.first * 1e3)


async def _alone(server: Server, work: Coroutine[Any, Any, _T]) -> _T:
    """Do something with one server while the other is paused."""
    server.go_on()
    try:
        return await work
    finally:
        server.pause()


async def _idle(server: Server, seconds: float) -> list[float]:
    await asyncio.sleep(SETTLE_SECONDS)
    before = [cpu_seconds(pids) for pids in server.ranks()]
    await asyncio.sleep(seconds)  # a measurement over a time
    return [(cpu_seconds(pids) - cpu) / seconds for pids, cpu in zip(server.ranks(), before, strict=True)]
