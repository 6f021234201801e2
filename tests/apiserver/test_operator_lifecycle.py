"""One instance from nothing to Ready and away again, counted at the API server's audit log."""

from collections import Counter

import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from tests.apiserver.harness import Manifest, World, condition, eventually


async def test_two_runners_become_ready_with_few_writes_and_each_child_created_once(place: World) -> None:
    await place.operator()
    mark = place.audit.mark()
    await place.create()
    instance = await place.until_ready()
    await place.settled()

    assert instance["status"]["runnersReady"] == "2/2"
    assert instance["status"]["epoch"] == 1
    done = Counter((r.verb, r.resource) for r in place.writes(mark))
    assert done["patch", "modelinstances/status"] <= 8, done
    told = [event["reason"] for event in await place.events()]
    assert told == [Reason.PODS_CREATED, Reason.EPOCH_STARTED, Reason.MODEL_LOADED, Reason.READY]
    created = Counter((r.resource, r.name) for r in place.writes(mark) if r.code == 201 and r.resource != "events")
    uid = instance["metadata"]["uid"]
    assert set(created.values()) == {1}, created
    assert {name for kind, name in created if kind == "services"} == {names.service_name("tiny")}
    assert Counter(r.resource for r in place.writes(mark) if r.verb == "create" and r.resource != "events") == {
        "pods": 2,
        "secrets": 1,
    }
    assert {pod["metadata"]["name"] for pod in await place.pods()} == {"tiny-0", "tiny-1"}
    assert all(pod["metadata"]["labels"][names.INSTANCE_UID_LABEL] == uid for pod in await place.pods())


async def test_nothing_is_written_while_nothing_happens(place: World) -> None:
    await place.operator("--sweep-min-seconds=1", "--sweep-max-seconds=1")
    await place.create()
    await place.until_ready()
    await place.settled()
    mark = place.audit.mark()
    await place.settled(6)  # two heartbeats of every runner and several sweeps
    assert place.writes(mark) == []


PHASES = [Reason.WAITING_FOR_PODS, Reason.WAITING_FOR_RUNNERS, Reason.EPOCH_STARTED, Reason.LOADING, Reason.READY]


@pytest.mark.parametrize("phase", PHASES)
async def test_an_instance_that_is_deleted_leaves_no_child_in(place: World, phase: Reason) -> None:
    await place.operator()
    await place.create()

    def reached(instance: Manifest) -> bool:
        reason = condition(instance, ConditionType.READY).get("reason")
        return reason in [each for each in Reason if each.ordinal >= phase.ordinal]

    await place.until(reached, f"{phase} is reached")
    await place.delete()

    async def gone() -> bool:
        return await place.children() == []

    await eventually(gone, "no child is left")


async def test_one_runner_needs_no_group(place: World) -> None:
    await place.operator()
    await place.create(runners=1)
    instance = await place.until_ready()
    assert condition(instance, ConditionType.CONNECTED)["status"] == "True"
