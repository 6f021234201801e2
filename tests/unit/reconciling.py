"""Where the tests of the reconciler begin: the real parts around an API server and a runner in memory."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mlx_operator.act.actor import Actor
from mlx_operator.act.kube import KubeError
from mlx_operator.act.recorder import Recorder
from mlx_operator.act.resources import EVENTS, INSTANCES, PODS, SERVICES
from mlx_operator.act.runner import RunnerError, RunnerPort
from mlx_operator.act.status_writer import StatusWriter
from mlx_operator.act.tasks import TaskSender
from mlx_operator.act.tokens import OperatorKey
from mlx_operator.decide.actions import ApplyService, CreatePod, Notice, Plan, SendTask, Step
from mlx_operator.decide.observed import Observed
from mlx_operator.metrics import Metrics
from mlx_operator.observe.observer import Observer
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator.reconciler import Reconciler
from mlx_operator.workqueue import WorkQueue
from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import LoadModel, TaskAnswer, TaskOutcome, TaskPhase, TaskRequest
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import NOW, SETTINGS, UID, instance, report

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
    missing: list[str] = field(default_factory=list)

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
            missing=self.missing.append,
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


def failing(*errors: tuple[str, str, int], reason: str = "Injected") -> Callable[[str, str, str], None]:
    left = list(errors)

    def fail(verb: str, plural: str, name: str) -> None:
        for error in left:
            if error[:2] == (verb, plural):
                left.remove(error)
                raise KubeError(error[2], reason, "injected")

    return fail
