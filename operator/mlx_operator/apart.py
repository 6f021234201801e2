"""Work whose failure is looked at by whoever asked for it, and takes nobody down."""

import asyncio
from collections.abc import Coroutine
from typing import Any


async def apart(work: Coroutine[Any, Any, None], *, name: str) -> BaseException | None:
    """Do it to its end in a task of its own; what it raised, None where it raised nothing or was cancelled."""
    task = asyncio.create_task(work, name=name)
    try:
        await asyncio.wait((task,))
    finally:
        task.cancel()
    return None if task.cancelled() else task.exception()
