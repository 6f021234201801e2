"""What begins in a handler of kopf's holds nothing of kopf's, and why it ended is not drowned."""

import asyncio
import gc
import logging
import weakref
from contextvars import ContextVar
from typing import Any

import aiohttp
import kopf
import pytest

from mlx_operator.act.resources import INSTANCES, NODES, PODS, SERVICES, Resource
from mlx_operator.errors import HostError
from mlx_operator.observe import host
from mlx_operator.observe.host import apart
from mlx_operator.observe.sweep import Scope


class _Body:
    """Such as kopf keeps in its context variables while a handler runs."""


_BODY: ContextVar[_Body] = ContextVar("_BODY")


async def test_a_task_that_begins_with_an_event_keeps_nothing_of_what_its_handler_was_given() -> None:
    began: list[asyncio.Task[bool]] = []
    fed: list[tuple[Resource, str | None, dict[str, Any]]] = []
    ended = asyncio.Event()

    def feed(resource: Resource, kind: str | None, item: dict[str, Any]) -> None:
        fed.append((resource, kind, item))
        began.append(asyncio.create_task(ended.wait()))

    async def handler() -> weakref.ref[_Body]:
        body = _Body()
        _BODY.set(body)
        apart(feed)(PODS, "ADDED", {"metadata": {"uid": "1"}})
        return weakref.ref(body)

    body = await asyncio.create_task(handler())
    await asyncio.sleep(0)  # the loop lets go of the handler's last step
    gc.collect()
    assert fed == [(PODS, "ADDED", {"metadata": {"uid": "1"}})]
    assert not began[0].done()
    assert body() is None
    ended.set()
    await began[0]


async def test_what_breaks_off_with_the_watches_does_not_have_the_last_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def cut() -> None:
        raise aiohttp.ClientConnectionError("Connection closed")

    async def operator(**_: Any) -> None:
        """One of two requests is awaited; that the other failed as well is said when its task is collected."""
        beside = asyncio.create_task(cut())
        await asyncio.wait([beside])
        cycle: list[Any] = [beside]
        cycle.append(cycle)
        await cut()

    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(kopf, "operator", operator)
    with pytest.raises(HostError, match="Connection closed") as raised:
        await host.watch(kopf.OperatorRegistry(), Scope(()), asyncio.Event())
    del raised
    await asyncio.sleep(0)  # the loop lets go of the last step
    gc.collect()
    after = [record for record in caplog.records if "never retrieved" in record.getMessage()]
    assert [(record.name, record.levelname) for record in after] == [("mlx_operator.observe.host", "DEBUG")]


def discovers(monkeypatch: pytest.MonkeyPatch, *kinds: Resource) -> tuple[asyncio.Event, list[str]]:
    """What a host finds that watches until it is told to end or is stopped; returns what ends it, and how it ended."""
    end, ended = asyncio.Event(), []

    async def operator(*, insights: Any, **_: Any) -> None:
        insights.watched_resources.update(kinds)
        insights.ready_resources.set()
        try:
            await end.wait()
            ended.append("by itself")
        except asyncio.CancelledError:
            ended.append("stopped")
            raise

    monkeypatch.setattr(kopf, "operator", operator)
    return end, ended


async def test_a_kind_that_the_discovery_did_not_find_ends_the_watches_with_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, ended = discovers(monkeypatch, PODS, SERVICES, NODES)
    with pytest.raises(HostError, match="modelinstances"):
        await asyncio.wait_for(host.watch(kopf.OperatorRegistry(), Scope(()), asyncio.Event()), 5)
    assert ended == ["stopped"]


@pytest.mark.parametrize("scope", [Scope(), Scope(("team",))])
async def test_the_watches_go_on_where_every_kind_was_found(monkeypatch: pytest.MonkeyPatch, scope: Scope) -> None:
    kinds = [INSTANCES, PODS, SERVICES, *([NODES] if scope.watches_nodes else [])]
    end, ended = discovers(monkeypatch, *kinds)
    watching = asyncio.create_task(host.watch(kopf.OperatorRegistry(), scope, asyncio.Event()))
    await asyncio.wait([watching], timeout=0.2)
    assert not watching.done()
    end.set()
    await watching
    assert ended == ["by itself"]


async def test_watches_that_are_cancelled_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ended = discovers(monkeypatch, INSTANCES, PODS, SERVICES, NODES)
    watching = asyncio.create_task(host.watch(kopf.OperatorRegistry(), Scope(), asyncio.Event()))
    await asyncio.wait([watching], timeout=0.1)
    watching.cancel()
    await asyncio.wait([watching])
    assert ended == ["stopped"]
