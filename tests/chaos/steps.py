"""The steps of a random walk: what may happen next to the API server, the operators, the runners and the specs."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES
from mlx_operator_api import names
from tests.apiserver.harness import Manifest
from tests.chaos.cast import Cast
from tests.chaos.faults import compact
from tests.chaos.proxy import FaultProxy
from tests.chaos.rules import Cut, Delay, Hang, HangUp, Refuse, Rule, Trouble, anything, not_leases, watches, writes
from tests.chaos.streams import Echo

TROUBLES: tuple[tuple[str, Callable[..., bool], Trouble, float], ...] = (
    ("409 to half of the writes", writes, Refuse((409,)), 0.5),
    ("429 to all", not_leases, Refuse((429,)), 1.0),
    ("500 and 503 to all", anything, Refuse((500, 503)), 1.0),
    ("no answers", not_leases, Hang(), 1.0),
    ("no answers to writes that are carried out", writes, Hang(carried_out=True), 1.0),
    ("a third of the connections dropped", anything, HangUp(), 0.33),
    ("a third of the answers lost", anything, HangUp(carried_out=True), 0.33),
    ("a third of the answers cut", not_leases, Cut(), 0.33),
    ("answers late by 1 s", anything, Delay(1.0), 1.0),
)


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happens, in words and as a deed; it may go on for a while."""

    what: str
    do: Callable[[], Awaitable[None]]


def draw(cast: Cast, chance: random.Random, outages: tuple[float, ...]) -> Step:
    """The next step."""
    return chance.choice(_MAKERS)(cast, chance, outages)


def _trouble(cast: Cast, chance: random.Random, _: tuple[float, ...]) -> Step:
    what, meets, trouble, share = chance.choice(TROUBLES)
    seconds, proxies = chance.uniform(1, 6), _proxies(cast, chance)

    async def do() -> None:
        async with AsyncExitStack() as stack:
            for proxy in proxies:
                await stack.enter_async_context(proxy.trouble(Rule(meets, trouble, share)))
            await asyncio.sleep(seconds)

    return Step(f"{what} for {seconds:.1f} s, for {_named(proxies)}", do)


@asynccontextmanager
async def _half_open(proxy: FaultProxy) -> AsyncIterator[None]:
    proxy.silence()
    yield
    proxy.speak()
    proxy.break_watches()  # the host would look for itself after a minute


@asynccontextmanager
async def _expired(proxy: FaultProxy) -> AsyncIterator[None]:
    async with proxy.trouble(Rule(watches, HangUp())):
        proxy.expire()
        proxy.break_watches()
        yield


@asynccontextmanager
async def _echoed(proxy: FaultProxy) -> AsyncIterator[None]:
    proxy.echo = Echo()
    yield
    proxy.echo = None


@asynccontextmanager
async def _broken(proxy: FaultProxy) -> AsyncIterator[None]:
    async with proxy.trouble(Rule(watches, HangUp())):
        proxy.break_watches()
        yield


_WATCH_TROUBLES = {"half-open": _half_open, "expired": _expired, "echoed": _echoed, "broken": _broken}


def _watches(cast: Cast, chance: random.Random, _: tuple[float, ...]) -> Step:
    kind = chance.choice(tuple(_WATCH_TROUBLES))
    seconds, proxies = chance.uniform(1, 6), _proxies(cast, chance)

    async def do() -> None:
        async with AsyncExitStack() as stack:
            for proxy in proxies:
                await stack.enter_async_context(_WATCH_TROUBLES[kind](proxy))
            await asyncio.sleep(seconds)

    return Step(f"watches {kind} for {seconds:.1f} s, for {_named(proxies)}", do)


def _outage(cast: Cast, chance: random.Random, outages: tuple[float, ...]) -> Step:
    seconds, compacted = chance.choice(outages), chance.random() < 0.5

    async def do() -> None:
        async with cast.api_server:
            if compacted:
                _, version = await cast.place.kube.list(INSTANCES, cast.place.namespace)
                await compact(cast.staged, version)
            await asyncio.to_thread(cast.place.server.stop_apiserver)
            await asyncio.sleep(seconds)
            await asyncio.to_thread(cast.place.server.start_apiserver)
            await asyncio.to_thread(cast.place.server.restart_controllers)

    return Step(f"API server away for {seconds:g} s{', history compacted' if compacted else ''}", do)


def _failure(cast: Cast, chance: random.Random, _: tuple[float, ...]) -> Step:
    kind = chance.choice(("engine killed", "engine killed", "supervisor killed", "pod deleted"))
    pod = names.pod_name(chance.choice(cast.instances), chance.randrange(2))

    async def do() -> None:
        if kind == "engine killed":
            cast.kill_engine(pod)
        elif kind == "supervisor killed":
            cast.kill_supervisor(pod)
        else:
            await cast.staged.delete_pod(pod)

    return Step(f"{kind}: {pod}", do)


def _operator(cast: Cast, chance: random.Random, _: tuple[float, ...]) -> Step:
    kind, replica = chance.choice(("killed", "stopped", "frozen", "partitioned")), chance.randrange(2)
    seconds = chance.uniform(1, 12)

    async def do() -> None:
        operator, proxy = cast.replicas[replica][-1], cast.proxies[replica]
        if operator.process.returncode is not None:
            return
        if kind == "killed":
            operator.process.kill()
        elif kind == "stopped":
            operator.process.terminate()
        elif kind == "frozen":
            os.kill(operator.process.pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            if operator.process.returncode is None:
                os.kill(operator.process.pid, signal.SIGCONT)
        else:
            async with proxy.partition():
                await asyncio.sleep(seconds)

    lasting = f" for {seconds:.1f} s" if kind in ("frozen", "partitioned") else ""
    return Step(f"operator {'ab'[replica]} {kind}{lasting}", do)


def _change(cast: Cast, chance: random.Random, _: tuple[float, ...]) -> Step:
    name, number = chance.choice(cast.instances), chance.randrange(10**6)
    body: Manifest
    what, body = chance.choice(
        (
            ("label", {"metadata": {"labels": {"example.com/number": str(number)}}}),
            ("environment", {"spec": {"runner": {"env": [{"name": "NUMBER", "value": str(number)}]}}}),
            ("deadline", {"spec": {"deadlines": {"load": f"{300 + number % 100}s"}}}),
            ("runners", {"spec": {"runners": 1 + number % 3}}),
            ("suspend", {"spec": {"suspend": True}}),
            ("restart", {"metadata": {"annotations": {names.RESTART_ANNOTATION: str(number)}}}),
            ("deletion", {}),
        )
    )

    async def do() -> None:
        cast.changed.add(name)
        if what == "deletion":
            await cast.place.delete(name)
        else:
            await cast.place.kube.merge_patch(INSTANCES, cast.place.namespace, name, body)

    return Step(f"{what} of {name} ({number})", do)


_MAKERS = (_trouble, _trouble, _trouble, _watches, _outage, _failure, _failure, _operator, _change, _change)
"""By weight."""


async def quietly(step: Step) -> None:
    """Do a step; what the API server does not take while it is away, or of what is gone, does not happen."""
    try:
        await step.do()
    except KubeError as error:
        if not error.transient and error.status not in (404, 409):
            raise


def _proxies(cast: Cast, chance: random.Random) -> list[FaultProxy]:
    return chance.choice(([cast.proxies[0]], [cast.proxies[1]], list(cast.proxies)))


def _named(proxies: list[FaultProxy]) -> str:
    return " and ".join(proxy.name[-1] for proxy in proxies)
