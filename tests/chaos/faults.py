"""The faults of the API server, each a row: what goes wrong for how long, and how soon after its end all is well.

docs/faults.md shows the same rows. What the drill of `drill.py` asserts of each: no failure is lost, no pod and no
engine is made twice, the API server is not flooded, and after the end all is Ready within the bound.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import aiohttp

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api.conditions import Reason
from tests.chaos.rules import Cut, Delay, Hang, HangUp, Refuse, Rule, not_leases, watches, writes
from tests.chaos.stage import Stage
from tests.chaos.streams import Echo

Injection = Callable[[Stage], AbstractAsyncContextManager[None]]


async def engine_killed(stage: Stage) -> None:
    """The failure that must not get lost, as the runners report it."""
    stage.place.kubelet.kill_engine("tiny-1")


async def pod_deleted(stage: Stage) -> None:
    """The failure that must not get lost, as only the API server knows it."""
    await stage.delete_pod("tiny-1")


@dataclass(frozen=True, slots=True)
class ApiFault:
    """One row."""

    id: str
    what: str
    injected: str
    inject: Injection
    seconds: float
    """How long it lasts."""
    within: float = 15.0
    """Seconds from its end until all is Ready."""
    failure: Callable[[Stage], Awaitable[None]] = engine_killed
    """What happens to the group meanwhile."""
    reason: Reason = Reason.ENGINE_CRASHED
    """What the failure is recorded as."""
    pods: int = 3
    """How many are created in all: two ranks and the second instance's."""
    early: bool = False
    """It begins before the operator is started."""
    outlived: bool = True
    """The operator's process goes on; otherwise its Deployment starts it again."""
    at_once: bool = True
    """It concerns one namespace's operator, so that several can be injected at once."""


def rules(*made: Callable[[], Rule]) -> Injection:
    """Rules of the proxy."""
    return lambda stage: stage.proxy.trouble(*(make() for make in made))


@asynccontextmanager
async def _echoed(stage: Stage) -> AsyncIterator[None]:
    stage.proxy.echo = Echo()
    yield
    assert stage.proxy.faults["echoed"] > 10, stage.proxy.faults
    stage.proxy.echo = None


@asynccontextmanager
async def _expired(stage: Stage) -> AsyncIterator[None]:
    proxy, place = stage.proxy, stage.place
    await place.create("goner", runners=1)
    await place.until_ready("goner")
    async with proxy.trouble(Rule(watches, HangUp())):
        proxy.expire()
        proxy.break_watches()
        await place.delete("goner")
        yield


@asynccontextmanager
async def _half_open(stage: Stage) -> AsyncIterator[None]:
    stage.proxy.silence()
    yield
    assert stage.proxy.faults["silenced"], "nothing was kept back"
    stage.proxy.speak()


@asynccontextmanager
async def _down(stage: Stage) -> AsyncIterator[None]:
    server = stage.place.server
    await asyncio.to_thread(server.stop_apiserver)
    try:
        yield
    finally:
        await asyncio.to_thread(server.start_apiserver)
        await asyncio.to_thread(server.restart_controllers)


@asynccontextmanager
async def _compacted(stage: Stage) -> AsyncIterator[None]:
    """What happened while nobody watched is compacted away, and the API server's cache of it is lost by a restart."""
    place, proxy = stage.place, stage.proxy
    await place.create("goner", runners=1)
    await place.until_ready("goner")
    async with proxy.trouble(Rule(watches, HangUp())):
        proxy.break_watches()
        await place.delete("goner")
        yield
        _, version = await place.kube.list(INSTANCES, place.namespace)
        await compact(stage, version)
        async with _down(stage):
            pass


async def compact(stage: Stage, revision: str) -> None:
    """Forget all of etcd's history before a revision."""
    port = (stage.place.server.folder / "etcd-port").read_text()
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session,
        session.post(
            f"http://127.0.0.1:{port}/v3/kv/compaction", json={"revision": revision, "physical": True}
        ) as answer,
    ):
        assert answer.status == 200, await answer.text()


FAULTS = (
    ApiFault(
        "half-open",
        "watches are half-open: they stay open and bring nothing",
        "the proxy keeps back all events; a pod is deleted meanwhile",
        _half_open,
        seconds=8,
        within=75,
        failure=pod_deleted,
        reason=Reason.POD_DELETED,
        pods=4,
    ),
    ApiFault(
        "conflicts",
        "409 to writes",
        "every other write is answered 409 Conflict and not carried out",
        rules(lambda: Rule(writes, Refuse((409,)), share=0.5)),
        seconds=8,
    ),
    ApiFault(
        "throttled",
        "429 with Retry-After",
        "every request is answered 429",
        rules(lambda: Rule(not_leases, Refuse((429,)))),
        seconds=8,
    ),
    ApiFault(
        "errors",
        "a burst of 500 and 503",
        "every request is answered 500 or 503",
        rules(lambda: Rule(not_leases, Refuse((500, 503)))),
        seconds=8,
    ),
    ApiFault(
        "unanswered",
        "requests are not answered",
        "the proxy holds every request and does not carry it out",
        rules(lambda: Rule(not_leases, Hang())),
        seconds=15,
    ),
    ApiFault(
        "unanswered-writes",
        "writes are carried out and not answered",
        "the proxy carries out every write and keeps the answer",
        rules(lambda: Rule(writes, Hang(carried_out=True))),
        seconds=15,
    ),
    ApiFault(
        "slow",
        "answers take 2 s",
        "the proxy delays every request by 2 s",
        rules(lambda: Rule(not_leases, Delay(2.0))),
        seconds=10,
    ),
    ApiFault(
        "gone",
        "410 Gone on watches, with deletions in between",
        "the watches break; a pod and a ModelInstance are deleted; each watch is then told that its version is too old",
        _expired,
        seconds=5,
        failure=pod_deleted,
        reason=Reason.POD_DELETED,
        pods=5,
    ),
    ApiFault(
        "echo",
        "duplicate and stale watch events",
        "after each event the proxy sends it once more, and an earlier version of its object",
        _echoed,
        seconds=5,
        early=True,
    ),
    ApiFault(
        "bad-network",
        "a bad network",
        "of the requests 6 % each are refused, dropped, carried out without an answer, cut in the middle of the answer",
        rules(
            lambda: Rule(not_leases, Refuse((429, 500, 503)), share=0.06),
            lambda: Rule(not_leases, HangUp(), share=0.06),
            lambda: Rule(not_leases, HangUp(carried_out=True), share=0.06),
            lambda: Rule(not_leases, Cut(), share=0.06),
        ),
        seconds=8,
        early=True,
        outlived=False,
    ),
    ApiFault(
        "compacted",
        "etcd is compacted and the API server restarted, with deletions in between",
        "the watches break; a pod and a ModelInstance are deleted; compaction; `kill -9` of the API server",
        _compacted,
        seconds=1,
        failure=pod_deleted,
        reason=Reason.POD_DELETED,
        pods=5,
        outlived=False,
        at_once=False,
    ),
    ApiFault(
        "outage-20s",
        "the API server is away for 20 s",
        "`kill -9` of the API server, started again after 20 s",
        _down,
        seconds=20,
        outlived=False,
        at_once=False,
    ),
)
BY_HAND = (
    ApiFault(
        "outage-2m",
        "the API server is away for 2 min",
        "`kill -9` of the API server, started again after 2 min",
        _down,
        seconds=120,
        outlived=False,
        at_once=False,
    ),
)
"""Too long for every run: `make soak ARGS="--fault outage-2m"`."""
