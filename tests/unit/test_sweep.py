"""The start barrier and the sweeps."""

import asyncio
from dataclasses import dataclass, field

import pytest

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES, NODES, PODS
from mlx_operator.errors import REFUSAL_SECONDS, StartError
from mlx_operator.metrics import Metrics
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator.observe.sweep import FIRST_SECONDS, Lister, Scope, Sweeper
from tests.unit.fakekube import FakeKube
from tests.unit.manifests import SETTINGS, instance, pod

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]
TINY = Key("default", "tiny")


@dataclass
class Scene:
    kube: FakeKube = field(default_factory=FakeKube)
    changes: list[Key] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(SETTINGS)
        self.lister = Lister(self.kube, self.store, Scope(), Metrics())

    def sweeper(self) -> Sweeper:
        return Sweeper(self.lister, self.changes.append, Metrics(), (100.0, 100.0))

    def sweeps(self) -> int:
        """Without the first one, which comes soon."""
        return max(0, self.kube.count("list", "pods") - 1)

    def fail(self, plural: str, status: int) -> None:
        def fail(verb: str, kind: str, name: str) -> None:
            if kind == plural:
                raise KubeError(status, "x", "injected")

        self.kube.before = fail


@pytest.fixture
def scene() -> Scene:
    return Scene()


async def test_the_start_loads_every_kind(scene: Scene) -> None:
    scene.kube.put(INSTANCES, instance())
    scene.kube.put(PODS, pod())
    await scene.lister.seed()
    assert scene.store.count(INSTANCES) == 1
    assert scene.store.count(PODS) == 1
    assert {plural for _, plural, _ in scene.kube.requests} == {"modelinstances", "pods", "services", "nodes"}


async def test_a_confined_operator_lists_its_namespaces_and_no_nodes() -> None:
    lists = Scope(("a", "b")).lists()
    assert {namespace for _, namespace, _ in lists} == {"a", "b"}
    assert NODES not in {resource for resource, _, _ in lists}


@pytest.mark.parametrize(("plural", "status", "words"), [("pods", 403, "list pods"), ("modelinstances", 404, "CRD")])
async def test_what_no_waiting_helps_ends_the_start(scene: Scene, plural: str, status: int, words: str) -> None:
    scene.fail(plural, status)
    with pytest.raises(StartError, match=words):
        await scene.lister.seed()


@pytest.mark.parametrize(
    ("plural", "status", "seconds"),
    [("services", 0, 60), ("pods", 403, REFUSAL_SECONDS / 2), ("modelinstances", 404, REFUSAL_SECONDS / 2)],
)
async def test_an_api_server_that_does_not_answer_or_has_just_started_is_waited_for(
    scene: Scene, plural: str, status: int, seconds: float
) -> None:
    scene.fail(plural, status)
    seeding = asyncio.create_task(scene.lister.seed())
    await asyncio.sleep(seconds)
    assert not seeding.done()
    scene.kube.before = lambda verb, plural, name: None
    await asyncio.wait_for(seeding, 10)


async def test_a_sweep_finds_what_the_watches_missed(scene: Scene) -> None:
    scene.store.put(PODS, scene.kube.put(PODS, pod()))
    running = asyncio.create_task(scene.sweeper().run())
    await asyncio.sleep(FIRST_SECONDS + 1)
    scene.store.put(PODS, pod(1, version=0, uid="gone"))
    assert scene.changes == []
    await asyncio.sleep(101)
    assert [known["metadata"]["uid"] for known in scene.store.pods()] == ["pod-0"]
    assert scene.changes == [TINY]
    await asyncio.sleep(100)
    assert scene.changes == [TINY]
    running.cancel()


async def test_a_failed_sweep_is_repeated_soon_and_removes_nothing(scene: Scene) -> None:
    scene.store.put(PODS, pod(version=0))
    scene.fail("pods", 429)
    running = asyncio.create_task(scene.sweeper().run())
    await asyncio.sleep(120)
    assert scene.sweeps() >= 3
    assert scene.store.count(PODS) == 1
    running.cancel()


async def test_what_a_sweep_found_before_it_failed_is_planned(scene: Scene) -> None:
    scene.kube.put(PODS, pod())
    scene.fail("nodes", 503)
    running = asyncio.create_task(scene.sweeper().run())
    await asyncio.sleep(120)
    assert scene.sweeps() >= 3
    assert scene.changes == [TINY]
    running.cancel()


async def test_what_went_before_the_watches_began_is_found_soon(scene: Scene) -> None:
    scene.store.put(PODS, pod(version=0))
    running = asyncio.create_task(scene.sweeper().run())
    await asyncio.sleep(FIRST_SECONDS + 1)
    assert scene.store.count(PODS) == 0
    assert scene.changes == [TINY]
    running.cancel()


@pytest.mark.parametrize("turns", range(5))
async def test_a_sweeper_that_is_cancelled_as_a_sweep_is_wanted_ends(scene: Scene, turns: int) -> None:
    sweeper = scene.sweeper()
    running = asyncio.create_task(sweeper.run())
    await asyncio.sleep(30)
    sweeper.relisted()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running], timeout=5)
    assert running.cancelled()


async def test_the_replay_at_the_start_triggers_no_sweep(scene: Scene) -> None:
    sweeper = scene.sweeper()
    running = asyncio.create_task(sweeper.run())
    for _ in range(40):
        sweeper.relisted()
        await asyncio.sleep(0.2)
    assert scene.sweeps() == 0
    running.cancel()


async def test_a_watch_that_starts_over_later_triggers_one_sweep(scene: Scene) -> None:
    sweeper = scene.sweeper()
    running = asyncio.create_task(sweeper.run())
    sweeper.relisted()
    await asyncio.sleep(30)
    for _ in range(200):
        sweeper.relisted()
    await asyncio.sleep(3)
    assert scene.sweeps() == 1
    running.cancel()
