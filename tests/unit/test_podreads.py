"""Pods whose report stream broke: read once, unless the watch tells of them first."""

import asyncio

import pytest

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import PODS
from mlx_operator.observe.podreads import PATIENCE_SECONDS, PodReads
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import SETTINGS, pod

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


class Scene:
    def __init__(self) -> None:
        self.kube, self.store = FakeKube(), Store(SETTINGS)
        self.changed: list[Key] = []
        self.reads = PodReads(self.kube, self.store, changed=self.changed.append)
        self.known = self.kube.put(PODS, pod())
        self.store.put(PODS, self.known)
        self.uid = self.known["metadata"]["uid"]

    async def broken(self, seconds: float = 2 * PATIENCE_SECONDS) -> None:
        """The stream breaks; then so many seconds pass."""
        running = asyncio.create_task(self.reads.run())
        self.reads.want(self.uid)
        await asyncio.sleep(seconds)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_pod_that_is_gone_is_forgotten_although_no_watch_tells() -> None:
    scene = Scene()
    scene.kube.objects.clear()
    await scene.broken()
    assert scene.store.pod(scene.uid) is None
    assert scene.changed == [Key("default", "tiny")]


async def test_a_pod_that_changed_is_known_as_it_is() -> None:
    scene = Scene()
    scene.kube.put(PODS, {**scene.known, "status": {"phase": "Failed"}})
    await scene.broken()
    known = scene.store.pod(scene.uid)
    assert known is not None
    assert known["status"]["phase"] == "Failed"
    assert scene.changed == [Key("default", "tiny")]


async def test_a_pod_under_the_same_name_takes_its_place() -> None:
    scene = Scene()
    other = {**scene.known, "metadata": {**scene.known["metadata"], "uid": "another"}}
    scene.kube.put(PODS, other)
    await scene.broken()
    assert scene.store.pod(scene.uid) is None
    assert scene.store.pod("another") is not None


async def test_a_pod_that_is_as_it_was_known_concerns_nobody() -> None:
    scene = Scene()
    await scene.broken()
    assert scene.kube.requests == [("list", "pods", "")]
    assert scene.changed == []


async def test_a_pod_of_which_a_watch_told_meanwhile_is_not_read() -> None:
    scene = Scene()
    scene.reads.want(scene.uid)
    scene.store.put(PODS, scene.kube.put(PODS, {**scene.known, "status": {"phase": "Failed"}}))
    await scene.broken()
    assert scene.kube.requests == []


async def test_a_read_that_fails_is_left_to_the_sweep_and_the_next_break_is_read_again() -> None:
    scene = Scene()

    def fail(verb: str, plural: str, name: str) -> None:
        raise KubeError(503, "x", "injected")

    scene.kube.before = fail
    await scene.broken()
    assert scene.store.pod(scene.uid) is not None
    scene.kube.before = lambda verb, plural, name: None
    scene.kube.objects.clear()
    await scene.broken()
    assert scene.store.pod(scene.uid) is None
