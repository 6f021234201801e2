"""The port to the API server: it waits where it is told to wait, on a virtual clock."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_operator.act.kube import LONGEST_PAUSE_SECONDS, Kube, KubeError
from mlx_operator.act.resources import LEASES, PODS

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


class Busy(Kube):
    """Answered by `answers`, one after the other, then always with success."""

    def __init__(self, *answers: tuple[int, dict[str, str]]) -> None:
        self._api = self
        self._observer = None
        self._pause_until = 0.0
        self._answers = list(answers)
        self.asked: list[float] = []

    async def param_serialize(self, *_: Any, **__: Any) -> tuple[()]:
        return ()

    async def call_api(self, *_: Any, **__: Any) -> Any:
        self.asked.append(asyncio.get_running_loop().time())
        status, headers = self._answers.pop(0) if self._answers else (200, {})

        async def read() -> bytes:
            return b"{}"

        return SimpleNamespace(status=status, headers=headers, read=read)


@pytest.mark.parametrize("status", [429, 503])
async def test_nothing_is_sent_for_as_long_as_the_api_server_asks(status: int) -> None:
    kube = Busy((status, {"Retry-After": "3"}))
    with pytest.raises(KubeError):
        await kube.get(PODS, "default", "tiny-0")
    await asyncio.gather(*(kube.get(PODS, "default", name) for name in ("tiny-0", "tiny-1")))
    first, *others = kube.asked
    assert [at - first for at in others] == pytest.approx([3.0, 3.0])


async def test_the_lease_waits_for_nobody() -> None:
    kube = Busy((429, {"Retry-After": "3"}))
    with pytest.raises(KubeError):
        await kube.get(PODS, "default", "tiny-0")
    await kube.get(LEASES, "system", "mlx-operator")
    assert kube.asked[0] == kube.asked[1]


@pytest.mark.parametrize(
    ("header", "seconds"), [("86400", LONGEST_PAUSE_SECONDS), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), ("-1", 0.0)]
)
async def test_no_header_makes_it_wait_for_long(header: str, seconds: float) -> None:
    kube = Busy((429, {"Retry-After": header}))
    with pytest.raises(KubeError):
        await kube.get(PODS, "default", "tiny-0")
    await kube.get(PODS, "default", "tiny-0")
    assert kube.asked[1] - kube.asked[0] == pytest.approx(seconds)
