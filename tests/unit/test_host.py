"""What begins in a handler of kopf's holds nothing of kopf's."""

import asyncio
import gc
import weakref
from contextvars import ContextVar
from typing import Any

from mlx_operator.act.resources import PODS, Resource
from mlx_operator.observe.host import apart


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
