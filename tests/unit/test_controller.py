"""The parts of a leading operator: one that ends by itself is told, with why."""

import asyncio
from typing import Any

import pytest

from mlx_operator.controller import Configuration, Controller
from mlx_operator.decide.plan import plan
from mlx_operator.metrics import Metrics
from mlx_operator.observe.podevents import PodEvents
from mlx_operator.observe.sweep import Scope
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import SETTINGS
from tests.unit.reconciling import KEY

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


def controller() -> Controller:
    configuration = Configuration(SETTINGS, Scope(), KEY, "test", 1, (60.0, 300.0))
    return Controller(FakeKube(), plan, configuration, Metrics())


async def test_a_part_that_ends_by_itself_is_named_and_logged_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: PodEvents) -> Any:
        raise KeyError("message")

    monkeypatch.setattr(PodEvents, "run", broken)
    parts = controller()
    await parts.start()
    assert parts.trouble() is None
    await asyncio.sleep(1)
    assert parts.trouble() == "pod events ended"
    (told,) = [record for record in caplog.records if record.exc_info]
    assert told.message == "part ended"
    assert "KeyError: 'message'" in str(told.mlx_fields)  # type: ignore[attr-defined]
    await parts.stop()


async def test_parts_that_are_stopped_are_no_trouble(caplog: pytest.LogCaptureFixture) -> None:
    parts = controller()
    await parts.start()
    await asyncio.sleep(1)
    await parts.stop()
    assert parts.trouble() is None
    assert "part ended" not in caplog.text
