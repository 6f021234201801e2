"""The operator's process: when its readiness probe says yes."""

import asyncio
from typing import Any

import pytest

from mlx_operator import main
from mlx_operator.act.resources import LEASES, SECRETS
from mlx_operator.decide.plan import plan
from mlx_operator.options import parse
from tests.unit.fakekube import FakeKube

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]
OPTIONS = parse(["--runner-image", "runner:1", "--namespace", "system"], {"POD_NAME": "operator-1"})


class SlowKube(FakeKube):
    """Answers nothing about Secrets before the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def get(self, resource: Any, namespace: str | None, name: str, *, seconds: float = 10.0) -> dict[str, Any]:
        if resource == SECRETS:
            await self.gate.wait()
        return await super().get(resource, namespace, name, seconds=seconds)


async def leading(kube: FakeKube) -> tuple[main.Process, asyncio.Task[None]]:
    process = main.Process(OPTIONS, plan)
    task = asyncio.create_task(process._lead(kube, None))
    await asyncio.sleep(1)
    return process, task


async def test_a_leader_that_has_not_its_key_yet_is_not_ready() -> None:
    process, task = await leading(SlowKube())
    assert process._unready() == "starting"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_standby_is_ready() -> None:
    kube = FakeKube()
    spec = {"holderIdentity": "operator-2_x", "leaseDurationSeconds": 10, "leaseTransitions": 1}
    kube.put(LEASES, {"metadata": {"name": OPTIONS.lease_name, "namespace": "system"}, "spec": spec})
    process, task = await leading(kube)
    assert process._unready() is None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
