"""What several files here begin with."""

from collections.abc import AsyncIterator

import pytest

from tests.unit.reconciling import Scene


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    yield scene
    await scene.sender.close()
    scene.queue.close()
