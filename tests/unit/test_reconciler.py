"""The order of effects: status, then actions, then events; and nothing after a conflict or an error."""

import asyncio
import logging
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import EVENTS, INSTANCES, PODS
from mlx_operator.act.status_writer import StatusWriter, wire
from mlx_operator.decide.actions import DeletePod, Plan
from mlx_operator.decide.observed import Observed
from mlx_operator.reconciler import DEADLINE_SECONDS
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.status import Condition, Status
from tests.unit.manifests import NOW, instance, pod
from tests.unit.reconciling import CREATE, LOAD, NOTICE, SERVICE, TINY, Scene, child, failing

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


async def test_status_comes_before_actions_and_actions_before_events(scene: Scene) -> None:
    scene.plans = [Plan(Status(epoch=1), (SERVICE, CREATE), (NOTICE,))]
    await scene.reconcile()
    await scene.post_events()
    assert scene.verbs() == [
        ("patch", "modelinstances"),
        ("get", "services"),
        ("apply", "services"),
        ("create", "secrets"),
        ("create", "pods"),
        ("create", "events"),
    ]


async def test_events_of_one_plan_have_times_in_their_order(scene: Scene) -> None:
    """By which `kubectl events` sorts."""
    reasons = (Reason.PODS_CREATED, Reason.EPOCH_STARTED, Reason.MODEL_LOADED)
    scene.plans = [Plan(Status(epoch=1), (), tuple(replace(NOTICE, reason=reason) for reason in reasons))]
    await scene.reconcile()
    await scene.post_events()
    posted = [item for place, item in scene.kube.objects.items() if place[0] == EVENTS.plural]
    assert [item["reason"] for item in sorted(posted, key=lambda item: str(item["eventTime"]))] == list(reasons)
    assert len({item["eventTime"] for item in posted}) == len(reasons)


async def test_a_conflict_plans_again_from_the_fresh_object_and_acts_once(scene: Scene) -> None:
    fresh = scene.kube.put(
        INSTANCES, {**scene.kube.objects["modelinstances", "default", "tiny"], "spec": {"runners": 3}}
    )
    scene.plans = [Plan(Status(epoch=1), (CREATE,), (NOTICE,))]
    await scene.reconcile()
    assert [o.instance["metadata"]["resourceVersion"] for o in scene.seen][-1] == fresh["metadata"]["resourceVersion"]
    assert len(scene.seen) == 2
    assert scene.kube.count("create", "pods") == 1
    assert scene.kube.objects["modelinstances", "default", "tiny"]["spec"] == {"runners": 3}


async def test_nothing_is_done_when_status_was_not_written(scene: Scene) -> None:
    scene.plans = [Plan(Status(epoch=1), (CREATE,), (NOTICE,))]
    scene.kube.before = failing(("patch", "modelinstances", 500))
    with pytest.raises(KubeError):
        await scene.reconcile()
    assert scene.kube.count("create", "pods") == 0
    assert scene.events() == 0


async def test_events_of_a_status_that_turns_out_to_stand_are_still_recorded(scene: Scene) -> None:
    said, quiet = Plan(Status(epoch=1), (), (NOTICE,)), Plan(Status(epoch=1))
    scene.plans = [said, quiet]
    scene.kube.after = failing(("patch", "modelinstances", 0))
    scene.kube.before = failing(("get", "modelinstances", 0))
    with pytest.raises(KubeError):
        await scene.reconcile()
    scene.store.put(INSTANCES, await scene.kube.get(INSTANCES, "default", "tiny"))
    await scene.reconcile()
    await scene.post_events()
    assert scene.events() == 1


async def test_such_a_status_that_is_seen_only_at_the_next_conflict_still_has_its_events(scene: Scene) -> None:
    said, other, quiet = Plan(Status(epoch=1), (), (NOTICE,)), Plan(Status(epoch=2)), Plan(Status(epoch=1))
    scene.plans = [said, other, quiet]
    scene.kube.after = failing(("patch", "modelinstances", 0))
    scene.kube.before = failing(("get", "modelinstances", 0))
    with pytest.raises(KubeError):
        await scene.reconcile()
    await scene.reconcile()
    await scene.post_events()
    assert scene.events() == 1


async def test_events_of_a_status_that_had_to_be_written_again_are_recorded_once(scene: Scene) -> None:
    scene.plans = [Plan(Status(epoch=1), (), (NOTICE,)), Plan(Status(epoch=1), (), (NOTICE,)), Plan(Status(epoch=1))]
    scene.kube.before = failing(("patch", "modelinstances", 500))
    with pytest.raises(KubeError):
        await scene.reconcile()
    for _ in range(3):
        await scene.reconcile()
    await scene.post_events()
    (event,) = (item for place, item in scene.kube.objects.items() if place[0] == EVENTS.plural)
    assert "series" not in event


async def test_an_unchanged_status_is_not_written_and_the_actions_are_done(scene: Scene) -> None:
    stored = scene.kube.put(INSTANCES, instance(status=wire(Status(epoch=1))))
    scene.store.put(INSTANCES, stored)
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    await scene.reconcile()
    assert scene.kube.count("patch", "modelinstances") == 0
    assert scene.kube.count("create", "pods") == 1


async def test_an_instance_that_is_being_deleted_is_left_alone(scene: Scene) -> None:
    gone = instance(version=99)
    gone["metadata"]["deletionTimestamp"] = "2026-11-23T15:00:00Z"
    scene.store.put(INSTANCES, gone)
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    await scene.reconcile()
    assert scene.kube.requests == []


async def test_every_decision_is_one_line_with_instance_epoch_rank_and_reason(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """What is about one rank names it."""
    scene.store.put(PODS, pod())
    why = Condition(
        type=ConditionType.READY,
        status="False",
        reason=Reason.OUT_OF_MEMORY,
        message="x",
        last_transition_time=NOW,
        observed_generation=1,
    )
    status = Status(epoch=3, conditions=(why,))
    delete = DeletePod("tiny-1", "pod-1", "its node is lost", rank=1)
    scene.kube.put(PODS, child(PODS, "tiny-1") | {"metadata": {**child(PODS, "tiny-1")["metadata"], "uid": "pod-1"}})
    notice = replace(NOTICE, reason=Reason.OUT_OF_MEMORY, epoch=3, rank=1)
    scene.plans = [Plan(status, (SERVICE, CREATE, delete, LOAD), (notice,))]
    with caplog.at_level(logging.INFO, "mlx_operator"):
        await scene.reconcile()
        await asyncio.sleep(0.01)
    lines = {record.getMessage(): vars(record)["mlx_fields"] for record in caplog.records}
    ranks = {"pod created": 0, "pod deleted": 1, "LoadModel sent": 0, "event": 1}
    assert set(lines) == {"status written", "service applied", "secret created", *ranks}
    assert all(fields["instance"] == "default/tiny" for fields in lines.values())
    assert all(fields["reason"] == "OutOfMemory" for fields in lines.values()), lines
    assert {what: fields["epoch"] for what, fields in lines.items()} == dict.fromkeys(lines, 3) | {"LoadModel sent": 1}
    assert {what: fields["rank"] for what, fields in lines.items() if "rank" in fields} == ranks


async def test_a_planned_time_brings_the_instance_back(scene: Scene) -> None:
    stored = scene.kube.put(INSTANCES, instance(status=wire(Status(epoch=1))))
    scene.store.put(INSTANCES, stored)
    scene.plans = [Plan(Status(epoch=1), requeue_at=NOW + timedelta(seconds=40))]
    await scene.reconcile()
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert await scene.queue.get() == TINY
    assert loop.time() - began == pytest.approx(40, abs=0.1)


async def test_a_bug_in_the_planner_is_logged_with_its_traceback_once_and_ends_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    def buggy(observed: Observed, now: datetime) -> Plan:
        raise ZeroDivisionError("a bug")

    scene.reconciler._plan = buggy
    worker = asyncio.create_task(scene.reconciler.run_worker())
    with caplog.at_level(logging.ERROR, "mlx_operator"):
        scene.queue.add(TINY)
        await asyncio.sleep(20)
    assert not worker.done()
    records = [record for record in caplog.records if record.getMessage() == "bug"]
    assert len(records) > 3
    assert [bool(record.exc_info) for record in records].count(True) == 1
    assert scene.metrics.registry.get_sample_value("mlx_operator_bugs_total") == len(records)
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def test_a_reconcile_that_hangs_is_ended_by_its_deadline(scene: Scene) -> None:
    class Hanging(StatusWriter):
        async def write(self, *_: object) -> Any:
            await asyncio.sleep(3600)

    scene.plans = [Plan(Status(epoch=1))]
    scene.reconciler._writer = Hanging(scene.kube)
    worker = asyncio.create_task(scene.reconciler.run_worker())
    scene.queue.add(TINY)
    await asyncio.sleep(DEADLINE_SECONDS * 3.3)
    assert len(scene.seen) >= 3
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
