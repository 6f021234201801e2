"""One instance at a time is restarted for a new key of the operator."""

from typing import Any

import pytest

from mlx_operator.act.resources import INSTANCES
from mlx_operator.act.status_writer import wire
from mlx_operator.decide.actions import Plan
from mlx_operator.decide.observed import Observed
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator.turns import Turns
from mlx_operator_api.conditions import Reason
from mlx_operator_api.status import Status
from tests.unit.manifests import SETTINGS, instance
from tests.unit.reconciling import TINY, Scene

A, B, C = (Key("default", name) for name in "abc")


class Place:
    """Three instances that are Ready with pods of the old key."""

    def __init__(self) -> None:
        self.store = Store(SETTINGS)
        self.version = 0
        for key in (A, B, C):
            self.put(key)
        self.turns = Turns(self.store)

    def put(
        self,
        key: Key,
        ready: str = "True",
        reason: Reason = Reason.READY,
        *,
        stalled: str = "False",
        epoch: int = 1,
        template: str = "old",
        **metadata: Any,
    ) -> None:
        self.version += 1
        conditions = [
            {"type": "Ready", "status": ready, "reason": str(reason)},
            {"type": "Stalled", "status": stalled, "reason": str(reason)},
        ]
        status = {"epoch": epoch, "templateHash": template, "conditions": conditions}
        item = instance(key.name, self.version, uid=f"uid-{key.name}", status=status)
        self.store.put(INSTANCES, {**item, "metadata": {**item["metadata"], **metadata}})

    def asked(self) -> list[bool]:
        return [self.turns.take(key) for key in (A, B, C)]


def test_the_first_that_asks_has_its_turn_until_its_status_shows_it_and_it_is_over() -> None:
    place = Place()
    assert place.asked() == [True, False, False]
    assert place.turns.next() is None, "its status is not written yet"
    assert place.asked() == [True, False, False], "planned again after a conflict"
    place.put(A, "False", Reason.WAITING_FOR_PODS, epoch=2, template="new")
    assert place.turns.next() is None
    assert [place.turns.take(key) for key in (B, C)] == [False, False]
    place.put(A, epoch=2, template="new")
    assert place.turns.next() == B
    assert [place.turns.take(key) for key in (B, C)] == [True, False]


OVER: dict[str, dict[str, Any]] = {
    "Stalled": {"ready": "False", "reason": Reason.IMAGE_PULL_FAILED, "stalled": "True", "epoch": 2},
    "suspended": {"ready": "False", "reason": Reason.SUSPENDED, "epoch": 2},
    "refused": {"ready": "False", "reason": Reason.INVALID_SPEC, "stalled": "True"},
    "being deleted": {"deletionTimestamp": "2026-11-23T15:00:00Z"},
}


@pytest.mark.parametrize("status", OVER.values(), ids=OVER)
def test_its_turn_is_over_when_it_is(status: dict[str, Any]) -> None:
    place = Place()
    place.asked()
    place.put(A, **status)
    assert place.turns.next() == B
    assert place.turns.take(B)


def test_its_turn_is_over_when_it_is_gone() -> None:
    place = Place()
    place.asked()
    place.store.remove(INSTANCES, "uid-a", "99")
    assert place.turns.take(C)
    assert not place.turns.take(B)


def test_a_restarted_operator_waits_for_the_one_that_is_under_way() -> None:
    place = Place()
    place.put(B, "False", Reason.WAITING_FOR_PODS, epoch=2, template="new")
    place.turns = Turns(place.store)
    assert [place.turns.take(key) for key in (A, C)] == [False, False]
    place.put(B, epoch=2, template="new")
    assert place.turns.next() == A
    assert place.turns.take(A)
    assert not place.turns.take(C)


def test_an_instance_that_is_made_meanwhile_holds_nobody_up() -> None:
    place = Place()
    place.put(B, "False", Reason.DOWNLOADING)
    assert place.turns.take(A)


@pytest.mark.looptime
async def test_the_next_is_planned_as_soon_as_the_one_before_it_is_done(scene: Scene) -> None:
    other = Key("default", "other")
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "message": "2/2 runners serve"}
    conditions = [{**ready, "observedGeneration": 1, "lastTransitionTime": "2026-11-23T15:00:00Z"}]
    for key, uid in ((TINY, "11111111-2222"), (other, "33333333-4444")):
        serves = Status.model_validate({"epoch": 1, "templateHash": "old", "conditions": conditions})
        item = instance(key.name, uid=uid, status=wire(serves))
        scene.store.put(INSTANCES, scene.kube.put(INSTANCES, item))
    rolled: list[str] = []

    def planner(observed: Observed, _: Any) -> Plan:
        name = observed.instance["metadata"]["name"]
        status = Status.model_validate(observed.instance["status"])
        if status.template_hash == "new" or not observed.turn:
            return Plan(status, waits=status.template_hash == "old")
        rolled.append(name)
        return Plan(status.model_copy(update={"epoch": 2, "template_hash": "new", "conditions": ()}))

    scene.reconciler._plan = planner
    for key in (other, TINY):
        await scene.reconciler.reconcile(key)
    assert rolled == ["other"], "no other one before its status shows that it is over"
    assert [await scene.queue.get() for _ in range(len(scene.queue))] == [other]
    done = scene.kube.objects["modelinstances", "default", "other"]
    done["status"]["conditions"] = conditions
    scene.store.put(INSTANCES, scene.kube.put(INSTANCES, done))
    await scene.reconciler.reconcile(other)
    assert await scene.queue.get() == TINY
    await scene.reconciler.reconcile(TINY)
    assert rolled == ["other", "tiny"]
