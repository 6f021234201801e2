"""The operator goes away, in every phase and in every way; nothing is lost and nothing is done twice."""

import asyncio
import re
from typing import Any

import pytest

from mlx_operator.act.resources import INSTANCES, LEASES, PODS, SECRETS
from mlx_operator.act.tokens import DEFAULT_KEY_SECRET
from mlx_operator.lease import Timing
from mlx_operator_api.conditions import ConditionType
from tests.apiserver.harness import World, again_in, condition, eventually
from tests.cluster.deploy import NAMESPACE, RELEASE

NONE_HUNG = "Hung tasks stopping is skipped: no tasks given."
"""The host's words: it found no task at its end that it would have waited 5 s for."""


async def test_a_restarted_operator_writes_nothing_where_nothing_is_to_be_done(place: World) -> None:
    first = await place.operator("--log-level=debug")
    await place.create("one")
    await place.create("two", runners=1)
    await place.until_ready("one")
    await place.until_ready("two")
    await place.settled()
    await first.stop()
    assert NONE_HUNG in first.lines()
    mark = place.audit.mark()
    await (await place.operator()).leads()
    await place.settled(4)
    assert place.writes(mark) == []


PHASES = ["WaitingForPods", "WaitingForRunners", "EpochStarted", "Connecting", "Loading", "WarmingUp", "Ready"]


@pytest.mark.parametrize("phase", PHASES)
async def test_the_group_converges_after_the_operator_is_killed_in(place: World, phase: str) -> None:
    first = await place.operator()
    await place.create()

    def reached(instance: dict[str, Any]) -> bool:
        reason = condition(instance, ConditionType.READY).get("reason", "")
        return reason in PHASES[PHASES.index(phase) :]

    await place.until(reached, f"{phase} is reached")
    await first.kill()
    await (await place.operator()).leads()
    instance = await place.until_ready()
    await place.settled()
    assert instance["status"]["epoch"] == 1
    assert instance["status"].get("history", []) == []
    assert len(await place.pods()) == 2
    reasons = [event["reason"] for event in await place.events()]
    assert len(reasons) == len(set(reasons)), reasons


async def test_a_failure_while_no_operator_runs_is_found_by_the_next_one(place: World) -> None:
    first = await place.operator()
    await place.create()
    before = await place.until_ready()
    await first.stop()
    pods = {pod["metadata"]["uid"] for pod in await place.pods()}
    place.kubelet.kill_engine("tiny-1")
    await place.operator()
    after = await place.until(again_in(2), "Ready again in epoch 2")
    assert before["status"]["epoch"] == 1
    failure = after["status"]["history"][0]
    assert failure["rank"] == 1, failure
    assert {pod["metadata"]["uid"] for pod in await place.pods()} == pods


async def test_another_key_restarts_one_instance_after_the_other_also_where_the_operator_dies_meanwhile(
    place: World,
) -> None:
    first = await place.operator()
    instances = ("one", "two", "three")
    for name in instances:
        await place.create(name, runners=1)
    for name in instances:
        await place.until_ready(name)
    await first.stop()
    secret = await place.kube.get(SECRETS, NAMESPACE, DEFAULT_KEY_SECRET)
    await place.kube.delete(SECRETS, NAMESPACE, DEFAULT_KEY_SECRET, uid=secret["metadata"]["uid"])
    second = await place.operator()

    async def under_way() -> bool:
        return _restarts(second.lines()) != []

    await eventually(under_way, "an instance is restarted for the new key")
    await second.kill()
    third = await place.operator()
    for name in instances:
        instance = await place.until(again_in(2), "Ready again in epoch 2", name=name)
        assert "history" not in instance["status"], instance["status"]
        assert instance["status"].get("restarts", 0) == 0
    restarting: set[str] = set()
    for name, ready in _restarts(second.lines() + third.lines()):
        restarting = restarting - {name} if ready == "True" else restarting | {name}
        assert len(restarting) <= 1, restarting


def _restarts(log: str) -> list[tuple[str, str]]:
    """Name and Ready of each status of epoch 2 that an operator wrote."""
    return re.findall(r'msg="status written" instance=\S+/(\w+) epoch=2 ready=(\w+)', log)


async def test_a_deletion_while_no_operator_runs_leaves_no_child(place: World) -> None:
    first = await place.operator()
    await place.create()
    await place.until_ready()
    await first.stop()
    await place.delete()

    async def gone() -> bool:
        return await place.children() == []

    await eventually(gone, "no child is left")
    await place.operator()
    await place.settled()
    assert await place.children() == []


async def test_a_second_operator_stands_by_and_takes_over(place: World) -> None:
    first = await place.operator()
    second = await place.operator(replica=1)
    await place.create()
    await place.until_ready()
    await place.settled()
    assert "standing by" in second.lines()
    assert "status written" not in second.lines()
    await first.stop()
    await second.leads()
    # It was given back: to run out it has until its last renewal and its duration are over.
    took = second.when("leading") - first.when("lease released")
    assert took.total_seconds() < Timing().duration - Timing().retry, took
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": {"runners": 1}})
    await place.until_ready()


async def test_the_lease_of_a_killed_operator_runs_out(place: World) -> None:
    first = await place.operator()
    await place.create()
    await place.until_ready()
    before = await place.kube.get(LEASES, NAMESPACE, RELEASE)
    await first.kill()
    place.kubelet.kill_engine("tiny-0")
    await (await place.operator(replica=1)).leads()
    after = await place.kube.get(LEASES, NAMESPACE, RELEASE)
    assert after["spec"]["leaseTransitions"] > before["spec"]["leaseTransitions"]
    await place.until(again_in(2), "Ready again in epoch 2")


async def test_a_leader_that_cannot_renew_ends_itself(place: World) -> None:
    first = await place.operator()
    # Of whatever version: the leader renews at any moment.
    await place.kube.merge_patch(LEASES, NAMESPACE, RELEASE, {"spec": {"holderIdentity": "somebody-else"}})
    assert await asyncio.wait_for(first.process.wait(), 10) == 1
    assert "leadership lost" in first.lines()


async def test_the_end_of_a_busy_operator_is_quick_and_clean(place: World) -> None:
    operator = await place.operator("--log-level=debug")
    for number in range(3):
        await place.create(f"busy-{number}")

    async def pods() -> bool:
        return len((await place.kube.list(PODS, place.namespace))[0]) == 6

    await eventually(pods, "all pods are created")
    await operator.stop()
    assert NONE_HUNG in operator.lines()
    assert operator.process.returncode == 0
    assert "lease released" in operator.lines()
    assert "Traceback" not in operator.lines()
    lease = await place.kube.get(LEASES, NAMESPACE, RELEASE)
    assert not lease["spec"].get("holderIdentity")
