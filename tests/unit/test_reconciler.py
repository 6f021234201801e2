"""The order of effects: status, then actions, then events; and nothing after a conflict or an error."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest

from mlx_operator.act.actor import Actor
from mlx_operator.act.kube import KubeError
from mlx_operator.act.recorder import Recorder
from mlx_operator.act.resources import EVENTS, INSTANCES, PODS, SECRETS, SERVICES
from mlx_operator.act.runner import RunnerError, RunnerPort
from mlx_operator.act.status_writer import StatusWriter, wire
from mlx_operator.act.tasks import TaskSender
from mlx_operator.act.tokens import OperatorKey
from mlx_operator.decide.actions import ApplyService, CreatePod, DeletePod, Notice, Plan, SendTask, Step
from mlx_operator.decide.observed import Observed, RunnerView
from mlx_operator.metrics import Metrics
from mlx_operator.observe.observer import Observer
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator.reconciler import Reconciler
from mlx_operator.workqueue import WorkQueue
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import TaskName
from mlx_operator_api.status import Condition, Status
from mlx_operator_api.tasks import LoadModel, TaskAnswer, TaskOutcome, TaskPhase, TaskRequest
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import NOW, SETTINGS, UID, instance, pod, report

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]
TINY = Key("default", "tiny")
NOTICE = Notice(
    type="Normal", reason=Reason.PODS_CREATED, note="creating pods", epoch=1, action="CreatePods", step=Step.CREATED
)
KEY = OperatorKey(b"k" * 32)


class FakeRunner(RunnerPort):
    """Answers tasks as a test says; an unset `gate` keeps the answer back."""

    def __init__(self) -> None:
        self.sent: list[TaskRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.errors: list[RunnerError] = []

    async def send(self, pod_ip: str, token: str, request: TaskRequest) -> TaskAnswer:
        self.sent.append(request)
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        outcome = TaskOutcome(name=request.task.name, epoch=request.epoch, phase=TaskPhase.RUNNING)
        return TaskAnswer(outcome=outcome, report=report(seq=len(self.sent)))


def child(resource: Any, name: str, owner: str = UID) -> dict[str, Any]:
    owners = [{"kind": "ModelInstance", "name": "tiny", "uid": owner, "controller": True}]
    labels = {names.INSTANCE_LABEL: "tiny", names.INSTANCE_UID_LABEL: owner, names.RANK_LABEL: "0"}
    metadata = {"name": name, "namespace": "default", "labels": labels, "ownerReferences": owners}
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": metadata}


GONE = {"uid": "gone", "resourceVersion": "1"}
CREATE = CreatePod("tiny-0", 0, child(PODS, "tiny-0"), "tiny-secret")
SERVICE = ApplyService("tiny", child(SERVICES, "tiny"))
LOAD = SendTask("tiny-0", "pod-0", "127.0.0.9", TaskRequest(instance_uid=UID, epoch=1, rank=0, task=LoadModel()))


@dataclass
class Scene:
    kube: FakeKube = field(default_factory=FakeKube)
    runner: FakeRunner = field(default_factory=FakeRunner)
    queue: WorkQueue[Key] = field(default_factory=WorkQueue)
    metrics: Metrics = field(default_factory=Metrics)
    plans: list[Plan] = field(default_factory=list)
    seen: list[Observed] = field(default_factory=list)
    time: datetime = NOW

    def __post_init__(self) -> None:
        self.store = Store(SETTINGS)
        observer = Observer(self.store, self.queue, self.metrics)
        self.sender = TaskSender(
            self.store,
            self.runner,
            token_of=KEY.token,
            changed=observer.changed,
            later=self.queue.add_after,
            now=self.now,
            metrics=self.metrics,
        )
        actor = Actor(
            self.kube,
            self.store,
            self.sender,
            token_of=KEY.token,
            answered=observer.answered,
            later=self.queue.add_after,
            now=self.now,
        )
        self.recorder = Recorder(self.kube, reporter="test", metrics=self.metrics)
        self.reconciler = Reconciler(
            store=self.store,
            queue=self.queue,
            planner=self.planner,
            writer=StatusWriter(self.kube),
            actor=actor,
            recorder=self.recorder,
            answered=observer.answered,
            now=self.now,
            metrics=self.metrics,
        )
        self.store.put(INSTANCES, self.kube.put(INSTANCES, instance()))

    def now(self) -> datetime:
        return self.time

    def planner(self, observed: Observed, now: datetime) -> Plan:
        self.seen.append(observed)
        return self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]

    async def reconcile(self) -> None:
        await self.reconciler.reconcile(TINY)

    def verbs(self) -> list[tuple[str, str]]:
        return [(verb, plural) for verb, plural, _ in self.kube.requests]

    async def post_events(self) -> None:
        task = asyncio.create_task(self.recorder.run())
        await self.recorder.flush()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def events(self) -> int:
        return sum(1 for place in self.kube.objects if place[0] == EVENTS.plural)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    yield scene
    await scene.sender.close()
    scene.queue.close()


def failing(*errors: tuple[str, str, int], reason: str = "Injected") -> Callable[[str, str, str], None]:
    left = list(errors)

    def fail(verb: str, plural: str, name: str) -> None:
        for error in left:
            if error[:2] == (verb, plural):
                left.remove(error)
                raise KubeError(error[2], reason, "injected")

    return fail


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


async def test_one_failed_action_keeps_no_other_from_being_tried(scene: Scene) -> None:
    other = replace(CREATE, name="tiny-1", rank=1, manifest=child(PODS, "tiny-1"))
    scene.plans = [Plan(Status(epoch=1), (CREATE, other), (NOTICE,))]
    scene.kube.before = failing(("create", "pods", 503))
    with pytest.raises(KubeError):
        await scene.reconcile()
    await scene.post_events()
    assert ("pods", "default", "tiny-1") in scene.kube.objects
    assert scene.events() == 1


async def test_a_refused_pod_is_shown_to_the_next_plan_and_not_tried_again_at_once(scene: Scene) -> None:
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    scene.kube.before = failing(("create", "pods", 403), ("create", "pods", 403))
    await scene.reconcile()
    await scene.reconcile()
    assert scene.seen[-1].refusals["tiny-0"].status == 403
    assert scene.kube.count("create", "pods") == 1
    scene.time += timedelta(seconds=5)
    await scene.reconcile()
    assert scene.kube.count("create", "pods") == 2
    scene.time += timedelta(seconds=10)
    await scene.reconcile()
    await scene.reconcile()
    assert scene.seen[-1].refusals == {}


async def test_a_webhook_that_is_down_is_shown_as_a_refusal_and_any_other_server_error_is_not(scene: Scene) -> None:
    words = 'Internal error occurred: failed calling webhook "pods.example.com": connection refused'
    answers = [KubeError(500, "InternalError", words), KubeError(500, "InternalError", "etcdserver: request timed out")]

    def before(verb: str, plural: str, _name: str) -> None:
        if (verb, plural) == ("create", "pods") and answers:
            raise answers.pop(0)

    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    scene.kube.before = before
    await scene.reconcile()
    assert scene.store.refusals.of(TINY)["tiny-0"].message == words
    scene.time += timedelta(seconds=5)
    with pytest.raises(KubeError, match="etcdserver"):
        await scene.reconcile()
    assert scene.store.refusals.of(TINY)["tiny-0"].message == words, "the last word about the pod itself"


async def test_a_quota_that_others_use_at_the_same_moment_is_no_refusal(scene: Scene) -> None:
    words = 'Operation cannot be fulfilled on resourcequotas "tight": the object has been modified'
    answers = [KubeError(409, "Conflict", words)]

    def before(verb: str, plural: str, _name: str) -> None:
        if (verb, plural) == ("create", "pods") and answers:
            raise answers.pop(0)

    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    scene.kube.before = before
    with pytest.raises(KubeError, match="resourcequotas"):
        await scene.reconcile()
    assert scene.store.refusals.of(TINY) == {}
    await scene.reconcile()
    assert [p["metadata"]["name"] for p in scene.store.pods()] == ["tiny-0"]


async def test_our_own_pod_under_the_name_counts_as_created(scene: Scene) -> None:
    scene.kube.put(PODS, child(PODS, "tiny-0"))
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    await scene.reconcile()
    assert [p["metadata"]["name"] for p in scene.store.pods()] == ["tiny-0"]
    assert scene.store.refusals.of(TINY) == {}


async def test_a_foreign_pod_under_the_name_is_a_refusal_that_names_its_owner(scene: Scene) -> None:
    scene.kube.put(PODS, child(PODS, "tiny-0", owner="another-uid"))
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    await scene.reconcile()
    refusal = scene.store.refusals.of(TINY)["tiny-0"]
    assert refusal.status == 409
    assert "belongs to ModelInstance tiny (uid another-uid)" in refusal.message


async def test_a_foreign_service_is_not_taken_over(scene: Scene) -> None:
    metadata = {"name": "tiny", "namespace": "default", "uid": "theirs"}
    scene.kube.put(SERVICES, {"metadata": metadata, "spec": {"selector": {"app": "theirs"}}})
    scene.plans = [Plan(Status(epoch=1), (SERVICE,))]
    await scene.reconcile()
    assert scene.kube.count("apply", "services") == 0
    assert scene.store.refusals.of(TINY)["tiny"].status == 409


async def test_a_service_that_went_unnoticed_is_made_again_without_a_refusal(scene: Scene) -> None:
    scene.store.put(SERVICES, child(SERVICES, "tiny") | {"metadata": {**child(SERVICES, "tiny")["metadata"], **GONE}})
    scene.plans = [Plan(Status(epoch=1), (SERVICE,))]
    await scene.reconcile()
    assert ("services", "default", "tiny") in scene.kube.objects
    assert scene.store.refusals.of(TINY) == {}


async def test_the_secret_is_posted_once_for_all_pods_of_a_plan(scene: Scene) -> None:
    other = replace(CREATE, name="tiny-1", rank=1, manifest=child(PODS, "tiny-1"))
    scene.plans = [Plan(Status(epoch=1), (CREATE, other))]
    await scene.reconcile()
    assert scene.kube.count("create", "secrets") == 1


async def test_an_existing_secret_is_fine(scene: Scene) -> None:
    secret = {"metadata": {"name": "tiny-secret", "namespace": "default"}}
    scene.kube.put(SECRETS, secret)
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    await scene.reconcile()
    assert ("pods", "default", "tiny-0") in scene.kube.objects


@pytest.mark.parametrize("status", [404, 409])
async def test_a_pod_that_is_already_gone_counts_as_deleted(scene: Scene, status: int) -> None:
    scene.plans = [Plan(Status(epoch=1), (DeletePod("tiny-0", "pod-0", "its template changed"),))]
    scene.kube.before = failing(("delete", "pods", status))
    await scene.reconcile()


async def test_a_pod_that_is_still_there_after_a_conflict_is_deleted_again(scene: Scene) -> None:
    uid = scene.kube.put(PODS, child(PODS, "tiny-0"))["metadata"]["uid"]
    scene.plans = [Plan(Status(epoch=1), (DeletePod("tiny-0", uid, "its template changed"),))]
    scene.kube.before = failing(("delete", "pods", 409), reason="Conflict")
    with pytest.raises(KubeError):
        await scene.reconcile()
    await scene.reconcile()
    assert ("pods", "default", "tiny-0") not in scene.kube.objects


@pytest.mark.parametrize("kind", ["secrets", "pods"])
async def test_a_child_that_lost_a_race_for_its_quota_is_no_refusal_and_is_made_with_the_next_try(
    scene: Scene, kind: str
) -> None:
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    scene.kube.before = failing(("create", kind, 409), reason="Conflict")
    with pytest.raises(KubeError):
        await scene.reconcile()
    assert scene.store.refusals.of(TINY) == {}
    await scene.reconcile()
    assert ("secrets", "default", "tiny-secret") in scene.kube.objects
    assert ("pods", "default", "tiny-0") in scene.kube.objects


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


async def test_a_hanging_task_keeps_no_status_from_being_written(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.gate.clear()
    scene.plans = [Plan(Status(epoch=1), (LOAD,)), Plan(Status(epoch=2), (LOAD,))]
    await scene.reconcile()
    await scene.reconcile()
    await asyncio.sleep(0)
    assert scene.kube.objects["modelinstances", "default", "tiny"]["status"]["epoch"] == 2
    assert len(scene.runner.sent) == 1


async def test_no_task_and_no_token_goes_to_a_pod_that_the_instance_does_not_control(scene: Scene) -> None:
    scene.store.put(PODS, pod(owner="another-uid"))
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    await scene.reconcile()
    await asyncio.sleep(10)
    assert scene.runner.sent == []


async def test_the_answer_to_a_task_is_observed_and_planned_again(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    await scene.reconcile()
    key = await asyncio.wait_for(scene.queue.get(), 1)  # the status that was written
    scene.queue.done(key, ok=True)
    assert await asyncio.wait_for(scene.queue.get(), 1) == TINY
    assert scene.store.view("pod-0").report == report(seq=1)


async def test_an_undelivered_task_is_sent_again_after_a_back_off(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.errors = [RunnerError(0, "refused") for _ in range(4)]
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    loop = asyncio.get_running_loop()
    times: list[float] = []
    scene.queue.add(TINY)
    while len(times) < 5:
        key = await asyncio.wait_for(scene.queue.get(), 10)
        before = len(scene.runner.sent)
        await scene.reconcile()
        await asyncio.sleep(0)
        if len(scene.runner.sent) > before:
            times.append(loop.time())
        scene.queue.done(key, ok=True)
    gaps = [round(after - before, 1) for before, after in pairwise(times)]
    assert gaps == [0.2, 0.4, 0.8, 1.6]
    assert scene.runner.sent[0].task.name is TaskName.LOAD_MODEL


async def test_an_answer_that_is_not_believed_is_not_asked_for_in_a_hot_loop(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.store.set_view("pod-0", RunnerView(report=report(incarnation="another"), connected=True))
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    worker = asyncio.create_task(scene.reconciler.run_worker())
    scene.queue.add(TINY)
    await asyncio.sleep(10)
    assert 2 <= len(scene.runner.sent) < 10
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def test_nothing_is_kept_of_a_pod_that_went_while_a_task_was_under_way(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.gate.clear()
    scene.runner.errors = [RunnerError(0, "refused")]
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    await scene.reconcile()
    await asyncio.sleep(0)
    scene.store.remove(PODS, "pod-0", "9")
    scene.runner.gate.set()
    await asyncio.sleep(0.1)
    assert len(scene.runner.sent) == 1
    assert not scene.sender._failures
    assert not scene.sender._not_before


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
    await asyncio.sleep(100)
    assert len(scene.seen) >= 3
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
