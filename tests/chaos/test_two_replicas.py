"""Two replicas: whatever becomes of the leader, its successor goes on, and nothing is done by both."""

import asyncio
import base64
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from mlx_operator.act.resources import LEASES, SECRETS
from mlx_operator.act.runner import RunnerError, RunnerPort
from mlx_operator.act.tokens import DEFAULT_KEY_SECRET, OperatorKey
from mlx_operator.lease import Timing
from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.tasks import Shutdown, TaskRequest
from tests.apiserver.harness import Manifest, OperatorProcess, again_in, condition
from tests.chaos.pool import Outcomes, chosen, side_by_side
from tests.chaos.proxy import FaultProxy
from tests.chaos.stage import Stage, stage, way
from tests.cluster.apiserver import ApiServer
from tests.cluster.audit import Request
from tests.cluster.deploy import RELEASE

LATE_SECONDS = 3.0
"""How much later than its deadline a process may end on a busy machine; still before anybody else may lead."""
TAKEOVER_SECONDS = Timing().duration + Timing().retry + LATE_SECONDS
"""The last renewal before a leader dies may be noticed at the next look."""


@dataclass
class Pair:
    """A leader and a standby, each with a way of its own to the API server, and a group of two runners that serves."""

    staged: Stage
    way: FaultProxy
    leader: OperatorProcess
    standby_way: FaultProxy
    standby: OperatorProcess

    async def transitions(self) -> int:
        lease = await self.staged.place.kube.get(LEASES, self.staged.place.namespace, RELEASE)
        return int(lease["spec"]["leaseTransitions"])

    def wrote(self, way: FaultProxy, mark: int) -> list[Request]:
        """What the API server was asked to change by a replica, since a mark of the audit log."""
        return self.staged.place.audit.writes(mark, user=way.name, leases=True)

    def tasks(self, operator: OperatorProcess) -> list[str]:
        return [line for line in operator.lines().splitlines() if " sent" in line or "not delivered" in line]

    async def check(self) -> None:
        """The failure is known once, and each child and each task was made once."""
        place = self.staged.place
        after = await place.until(again_in(2), "Ready again in epoch 2")
        await self.staged.idle()
        assert [failure["epoch"] for failure in after["status"]["history"]] == [1]
        assert len(await place.pods()) == 2
        users = {self.way.name, self.standby_way.name}
        made = [r for r in place.audit.writes(self.staged.mark) if r.user in users and r.code == 201]
        kinds = sorted(r.resource for r in made if r.resource != "events")
        # Of the two Secrets one is the operator's key.
        assert kinds == ["pods", "pods", "secrets", "secrets", "services"], made
        for name in ("tiny-0", "tiny-1"):
            accepted = self.staged.accepted(name)
            assert accepted["CreateRunner", 2] == 1, accepted
            assert set(accepted.values()) == {1}, accepted
        self.staged.check([self.leader, self.standby])


@asynccontextmanager
async def pair(server: ApiServer, namespace: str, folder: Path) -> AsyncIterator[Pair]:
    async with stage(server, namespace, folder) as staged, way(staged, "b") as standby_way:
        leader = await staged.place.operator(*staged.through(staged.proxy))
        standby = await staged.place.operator(*staged.through(standby_way), replica=1)
        await staged.place.create()
        await staged.place.until_ready()
        await staged.idle()
        assert "standing by" in standby.lines()
        yield Pair(staged, staged.proxy, leader, standby_way, standby)


async def killed(server: ApiServer, folder: Path) -> str:
    """The leader dies with a restart of the group half done."""
    async with pair(server, "two-killed", folder) as two:
        place = two.staged.place
        place.kubelet.kill_engine("tiny-1")

        def recorded(instance: Manifest) -> bool:
            return bool(condition(instance, ConditionType.RUNNER_FAILED).get("status") == "True")

        await place.until(recorded, "the failure is recorded")
        await two.leader.kill()
        began = datetime.now(UTC)
        await two.standby.leads()
        took = (two.standby.when("leading") - began).total_seconds()
        await two.check()
        assert took < TAKEOVER_SECONDS, f"the standby took over after {took:.1f} s"
        return f"the standby led {took:.1f} s after the leader was killed"


async def partitioned(server: ApiServer, folder: Path) -> str:
    """The leader reaches the runners and no longer the API server, and its group fails."""
    async with pair(server, "two-partitioned", folder) as two:
        place, loop = two.staged.place, asyncio.get_running_loop()
        before, sent, mark = await two.transitions(), two.tasks(two.leader), place.audit.mark()
        async with two.way.partition():
            began = loop.time()
            place.kubelet.kill_engine("tiny-1")
            assert await asyncio.wait_for(two.leader.process.wait(), 30) == 1
            ended = loop.time() - began
            await two.standby.leads()
            took = loop.time() - began
            await two.check()
        lost, led = two.leader.when("leadership lost, exiting"), two.standby.when("leading")
        assert lost < led, f"two led at once: one until {lost}, the other from {led}"
        assert ended < Timing().renew_deadline + LATE_SECONDS, f"it ended itself after {ended:.1f} s"
        # What it could not record it did not act upon.
        assert two.tasks(two.leader) == sent
        assert two.wrote(two.way, mark) == []
        assert await two.transitions() > before
        await _refused(two, before)
        return f"the partitioned leader ended itself after {ended:.1f} s, the standby led after {took:.1f} s"


async def frozen(server: ApiServer, folder: Path) -> str:
    """The leader sleeps through its lease and wakes up as if nothing had happened."""
    async with pair(server, "two-frozen", folder) as two:
        place, loop = two.staged.place, asyncio.get_running_loop()
        before, sent = await two.transitions(), two.tasks(two.leader)
        os.kill(two.leader.process.pid, signal.SIGSTOP)
        try:
            place.kubelet.kill_engine("tiny-1")
            await two.standby.leads()
            await two.check()
            mark = place.audit.mark()
        finally:
            os.kill(two.leader.process.pid, signal.SIGCONT)
        woke = loop.time()
        assert await asyncio.wait_for(two.leader.process.wait(), 30) == 1
        ended = loop.time() - woke
        await two.staged.idle()
        assert two.tasks(two.leader) == sent
        assert two.wrote(two.way, mark) == []
        await _refused(two, before)
        await two.check()
        return f"the frozen leader ended itself {ended:.2f} s after it woke up"


async def _refused(two: Pair, transitions: int) -> None:
    """A task of the former leader, such as one that was long on its way, is refused and changes nothing."""
    place = two.staged.place
    instance = await place.get()
    secret = await place.kube.get(SECRETS, place.namespace, DEFAULT_KEY_SECRET)
    token = OperatorKey(base64.b64decode(secret["data"]["key"])).token(instance["metadata"]["uid"])
    port = RunnerPort()
    request = TaskRequest(
        instance_uid=instance["metadata"]["uid"], epoch=2, rank=1, lease_transitions=transitions, task=Shutdown()
    )
    try:
        with pytest.raises(RunnerError) as refusal:
            await port.send(place.kubelet.of("tiny-1").ip, token, request)
    finally:
        await port.close()
    assert refusal.value.status == 409
    assert "no longer the leader" in str(refusal.value)
    await place.until(again_in(2), "still Ready in epoch 2", seconds=10)


SCENES = {"killed": killed, "partitioned": partitioned, "frozen": frozen}


@pytest.fixture(scope="module")
def outcomes(
    api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Outcomes[str]:
    scenes = [str(scene) for scene in chosen(request, "scene")]
    return side_by_side({name: partial(SCENES[name], api_server, tmp_path_factory.mktemp(name)) for name in scenes})


@pytest.mark.timeout(600)  # the first one waits for all
@pytest.mark.parametrize("scene", SCENES)
def test_the_standby_goes_on_after_a_leader_that_was(outcomes: Outcomes[str], scene: str) -> None:
    print(outcomes.of(scene))
