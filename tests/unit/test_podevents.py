"""What Kubernetes says of pods that wait: asked seldom, and never for pods that run."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest

from mlx_operator.act.resources import CORE_EVENTS, PODS
from mlx_operator.metrics import Metrics
from mlx_operator.observe.podevents import LONGEST_PERIOD_SECONDS, PodEvents, notes
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import NOW, SETTINGS, pod

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


KILLED = "Container runner failed liveness probe, will be restarted"


def said(reason: str, message: str, time: str, kind: str = "Warning") -> dict[str, Any]:
    metadata = {"name": f"tiny-0.{reason}.{time}", "namespace": "default"}
    event = {"metadata": metadata, "type": kind, "reason": reason, "message": message}
    return event | {"lastTimestamp": f"2026-11-23T{time}Z"}


@dataclass
class Scene:
    kube: FakeKube = field(default_factory=FakeKube)
    changes: list[Key] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.store = Store(SETTINGS)
        self.events = PodEvents(self.kube, self.store, changed=self.changes.append, now=self.now, metrics=self.metrics)
        self.store.pod_changed = self.events.pod_changed
        self._began: float | None = None

    def now(self) -> datetime:
        if self._began is None:  # not before the test: its clock is another one than the fixture's
            self._began = asyncio.get_running_loop().time()
        return NOW + timedelta(seconds=asyncio.get_running_loop().time() - self._began)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    task = asyncio.create_task(scene.events.run())
    yield scene
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_nothing_is_asked_while_all_pods_run(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    await asyncio.sleep(600)
    assert scene.kube.requests == []


async def test_the_words_about_a_waiting_pod_are_kept_and_concern_its_instance(scene: Scene) -> None:
    scene.kube.put(CORE_EVENTS, said("FailedScheduling", "0/2 nodes are available", "14:59:30"))
    scene.store.put(PODS, pod(ip=None))
    await asyncio.sleep(3)
    assert scene.store.warnings("pod-0") == ("FailedScheduling: 0/2 nodes are available",)
    assert scene.changes == [Key("default", "tiny")]


async def test_a_fresh_pod_is_given_time(scene: Scene) -> None:
    fresh = pod(ip=None)
    fresh["metadata"]["creationTimestamp"] = "2026-11-23T15:00:00Z"
    scene.store.put(PODS, fresh)
    await asyncio.sleep(4)
    assert scene.kube.requests == []
    await asyncio.sleep(3)
    assert scene.kube.count("list", "events") == 1


async def test_a_pod_of_which_nothing_new_is_said_is_asked_about_less_and_less(scene: Scene) -> None:
    scene.store.put(PODS, pod(ip=None))
    await asyncio.sleep(600)
    assert scene.kube.count("list", "events") <= 4 + 600 / LONGEST_PERIOD_SECONDS


async def test_a_pod_that_runs_is_forgotten(scene: Scene) -> None:
    scene.kube.put(CORE_EVENTS, said("FailedScheduling", "no node", "14:59:30"))
    scene.store.put(PODS, pod(version=1, ip=None))
    await asyncio.sleep(3)
    scene.store.put(PODS, pod(version=2))
    asked = len(scene.kube.requests)
    assert scene.store.warnings("pod-0") == ()
    await asyncio.sleep(100)
    assert len(scene.kube.requests) == asked


def ended(finished: str, started: str = "14:50:00") -> dict[str, Any]:
    end = {"startedAt": f"2026-11-23T{started}Z", "finishedAt": f"2026-11-23T{finished}Z", "exitCode": 137}
    return {"containerStatuses": [{"name": "runner", "state": {"running": {}}, "lastState": {"terminated": end}}]}


async def test_why_a_container_ended_is_asked_at_once_and_not_for_ever(scene: Scene) -> None:
    scene.kube.put(CORE_EVENTS, said("Killing", KILLED, "14:59:50", "Normal"))
    scene.kube.put(CORE_EVENTS, said("Unhealthy", "Liveness probe failed: timed out", "14:59:49"))
    scene.kube.put(CORE_EVENTS, said("Unhealthy", "Readiness probe failed: HTTP 503", "14:59:55"))
    scene.store.put(PODS, pod(version=1) | {"status": pod()["status"] | ended("14:59:59")})
    await asyncio.sleep(1)
    assert scene.store.warnings("pod-0") == (
        f"Killing: {KILLED}",
        "Unhealthy: Liveness probe failed: timed out",
    )
    await asyncio.sleep(600)
    asked = len(scene.kube.requests)
    assert asked <= 5
    scene.store.put(PODS, pod(version=2) | {"status": pod()["status"] | ended("14:59:59")})
    await asyncio.sleep(100)
    assert len(scene.kube.requests) == asked
    assert scene.store.warnings("pod-0") == ()


def test_an_event_without_a_message_is_told_by_its_reason_alone() -> None:
    silent = said("FailedMount", "", "14:50:00")
    del silent["message"]
    assert notes([silent, said("FailedScheduling", "no node", "14:49:00")]) == (
        "FailedMount",
        "FailedScheduling: no node",
    )
    assert notes([silent | {"reason": "Killing"}], {"startedAt": "2026-11-23T14:30:00Z"}) == ()
    assert notes([{"metadata": silent["metadata"]}]) == ()


async def test_an_event_that_nobody_foresaw_costs_no_other_pod_its_words(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    broken = said("FailedMount", "x", "14:50:00") | {"series": "no object"}
    uid, good = "pod-1", said("FailedScheduling", "no node", "14:59:30")
    listed = scene.kube.list

    async def listing(*of: Any, fields: str | None = None, **how: Any) -> Any:
        _, version = await listed(*of, fields=fields, **how)
        return [good if fields is not None and fields.endswith(uid) else broken], version

    scene.kube.list = listing  # type: ignore[method-assign]
    scene.store.put(PODS, pod(0, ip=None))
    scene.store.put(PODS, pod(1, ip=None))
    await asyncio.sleep(3)
    assert scene.store.warnings(uid) == ("FailedScheduling: no node",)
    (told,) = [record for record in caplog.records if record.exc_info]
    assert told.message == "bug in the events of a pod"
    await asyncio.sleep(600)
    assert scene.kube.count("list", "events") <= 2 * (4 + 600 / LONGEST_PERIOD_SECONDS), "and is not asked for ever"


def test_what_the_kubelet_said_of_an_earlier_container_is_left_out() -> None:
    events = [said("Killing", KILLED, "14:40:00", "Normal")]
    assert notes(events, {"startedAt": "2026-11-23T14:50:00Z"}) == ()
    assert notes(events, {"startedAt": "2026-11-23T14:30:00Z"}) == (f"Killing: {KILLED}",)
    assert notes(events) == ()


@pytest.mark.parametrize(
    ("warning", "step"),
    [
        ("FailedScheduling", "Scheduled"),
        ("FailedMount", "Pulling"),
        ("FailedCreatePodSandBox", "Pulled"),
        ("FailedAttachVolume", "SuccessfulAttachVolume"),
    ],
)
def test_a_warning_is_over_once_the_pod_got_beyond_it(warning: str, step: str) -> None:
    trouble = said(warning, "not found", "14:50:00")
    assert notes([trouble, said(step, "done", "14:49:00", "Normal")]) == (f"{warning}: not found",)
    assert notes([trouble, said(step, "done", "14:51:00", "Normal")]) == ()


def test_events_of_the_scheduler_and_of_the_kubelet_are_compared_by_the_second() -> None:
    early = said("FailedScheduling", "no node", "x") | {"lastTimestamp": None}
    early["eventTime"] = "2026-11-23T14:50:00.900000Z"
    assert notes([early, said("Scheduled", "placed", "14:50:01", "Normal")]) == ()


def test_the_newest_words_come_first_and_each_once() -> None:
    events = [
        said("Failed", "old", "14:00:00"),
        said("Failed", "new", "14:02:00"),
        said("Failed", "old", "14:01:00"),
    ]
    assert notes(events) == ("Failed: new", "Failed: old")
