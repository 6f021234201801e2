"""What Kubernetes says of pods that wait: asked seldom, and never for pods that run."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest

from mlx_operator.act.resources import CORE_EVENTS, PODS
from mlx_operator.observe.podevents import LONGEST_PERIOD_SECONDS, PodEvents, notes
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import NOW, SETTINGS, pod

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


def said(reason: str, message: str, time: str) -> dict[str, Any]:
    metadata = {"name": f"tiny-0.{reason}.{time}", "namespace": "default"}
    return {"metadata": metadata, "reason": reason, "message": message, "lastTimestamp": f"2026-11-23T{time}Z"}


@dataclass
class Scene:
    kube: FakeKube = field(default_factory=FakeKube)
    changes: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(SETTINGS)
        self.events = PodEvents(self.kube, self.store, changed=self.changes.append, now=self.now)
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


def test_the_newest_words_come_first_and_each_once() -> None:
    events = [
        said("Failed", "old", "14:00:00"),
        said("Failed", "new", "14:02:00"),
        said("Failed", "old", "14:01:00"),
    ]
    assert notes(events) == ("Failed: new", "Failed: old")
