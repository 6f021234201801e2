"""The store: newer replaces older in whatever order it arrives, and only what matters queues anybody."""

from dataclasses import replace
from datetime import timedelta

import pytest

from mlx_operator.act.resources import INSTANCES, NODES, PODS, SERVICES
from mlx_operator.decide.observed import Refusal, RunnerView
from mlx_operator.observe.refusals import Refusals
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator_api import names
from tests.unit.manifests import NOW, SETTINGS, instance, node, pod

TINY = Key("default", "tiny")
NOBODY: frozenset[Key] = frozenset()


@pytest.fixture
def store() -> Store:
    return Store(SETTINGS)


def test_an_older_version_never_replaces_a_newer_one(store: Store) -> None:
    assert store.put(INSTANCES, instance(version=10, status={"epoch": 2})) == {TINY}
    assert store.put(INSTANCES, instance(version=9, status={"epoch": 1})) == NOBODY
    assert store.put(INSTANCES, instance(version=10, status={"epoch": 1})) == NOBODY
    observed = store.observed(TINY)
    assert observed is not None
    assert observed.instance["status"] == {"epoch": 2}


def test_versions_are_compared_as_numbers_not_as_text(store: Store) -> None:
    store.put(INSTANCES, instance(version=9))
    assert store.put(INSTANCES, instance(version=10)) == {TINY}


def test_a_deletion_of_another_uid_leaves_the_new_object(store: Store) -> None:
    store.put(INSTANCES, instance(version=1, uid="old"))
    store.put(INSTANCES, instance(version=5, uid="new"))
    store.remove(INSTANCES, "old", "4")
    observed = store.observed(TINY)
    assert observed is not None
    assert observed.instance["metadata"]["uid"] == "new"


def test_a_late_answer_does_not_bring_a_deleted_object_back(store: Store) -> None:
    store.put(INSTANCES, instance(version=3))
    store.remove(INSTANCES, instance()["metadata"]["uid"], "7")
    assert store.put(INSTANCES, instance(version=5)) == NOBODY
    assert store.observed(TINY) is None


def test_an_object_whose_label_comes_back_is_seen_again(store: Store) -> None:
    store.put(PODS, pod(version=3))
    store.remove(PODS, "pod-0", "7")
    assert store.put(PODS, pod(version=8)) == {TINY}


def test_managed_fields_are_dropped(store: Store) -> None:
    store.put(PODS, pod())
    kept = store.pod("pod-0")
    assert kept is not None
    assert "managedFields" not in kept["metadata"]


def test_of_a_pod_is_kept_what_happens_to_it_and_not_how_we_said_that_it_runs(store: Store) -> None:
    box = {"name": names.CONTAINER, "resources": {"limits": {"memory": "1Gi"}}, "env": [{"name": "A", "value": "b"}]}
    spec = {"nodeName": "n1", "containers": [box], "volumes": [{"name": "token"}], "tolerations": [{"key": "k"}]}
    whole = pod(spec=spec)
    store.put(PODS, whole)
    kept = store.pod("pod-0")
    assert kept is not None
    assert kept["spec"]["containers"] == [{key: box[key] for key in ("name", "resources")}]
    assert {key: kept["spec"][key] for key in ("nodeName", "volumes")} == {
        key: spec[key] for key in ("nodeName", "volumes")
    }
    assert "tolerations" not in kept["spec"]
    assert kept["status"] == whole["status"]
    assert box["env"], "the object of a watch is not changed"


def test_nothing_but_the_managed_fields_is_dropped_of_an_instance(store: Store) -> None:
    whole = instance(status={"epoch": 2, "brief": ["a" * 100], "runners": [{"rank": 0}]})
    store.put(INSTANCES, whole)
    observed = store.observed(TINY)
    assert observed is not None
    assert observed.instance == whole


def test_a_list_removes_what_it_does_not_have(store: Store) -> None:
    store.put(PODS, pod(0, version=3))
    store.put(PODS, pod(1, version=4))
    assert store.replace(PODS, [pod(0, version=3)], "9", None) == {TINY}
    assert [p["metadata"]["uid"] for p in store.pods()] == ["pod-0"]


def test_a_list_says_nothing_about_what_is_newer_than_it(store: Store) -> None:
    store.put(PODS, pod(0, version=12))
    assert store.replace(PODS, [], "9", None) == NOBODY
    assert store.count(PODS) == 1


def test_a_list_of_one_namespace_says_nothing_about_another(store: Store) -> None:
    store.put(PODS, pod(0, version=3))
    assert store.replace(PODS, [], "9", "elsewhere") == NOBODY


def test_an_unchanged_list_touches_nobody(store: Store) -> None:
    items = [pod(0, version=3), pod(1, version=4)]
    assert store.replace(PODS, items, "9", None) == {TINY}
    assert store.replace(PODS, items, "9", None) == NOBODY


def test_a_heartbeat_of_a_node_touches_nobody_and_its_loss_touches_those_on_it(store: Store) -> None:
    store.put(INSTANCES, instance())
    store.put(PODS, pod())
    assert store.put(NODES, node(version=1)) == {TINY}
    assert store.put(NODES, node(version=2, heartbeat="15:00:00")) == NOBODY
    assert store.put(NODES, node(version=3, ready="Unknown")) == {TINY}
    observed = store.observed(TINY)
    assert observed is not None
    assert not observed.nodes["n1"].ready


def test_an_observation_does_not_change_when_the_nodes_do(store: Store) -> None:
    store.put(INSTANCES, instance())
    store.put(NODES, node(version=1))
    before = store.observed(TINY)
    store.put(NODES, node(version=2, ready="False"))
    assert before is not None
    assert before.nodes["n1"].ready


def test_the_service_is_the_one_with_our_name(store: Store) -> None:
    labels = {names.INSTANCE_LABEL: "tiny"}
    for name in ("another", names.service_name("tiny")):
        metadata = {"name": name, "namespace": "default", "uid": name, "resourceVersion": "1", "labels": labels}
        store.put(SERVICES, {"metadata": metadata})
    found = store.service(TINY)
    assert found is not None
    assert found["metadata"]["name"] == names.service_name("tiny")


def test_what_is_known_of_a_runner_goes_with_its_pod(store: Store) -> None:
    store.put(PODS, pod())
    view = RunnerView(connected=True)
    assert store.set_view("pod-0", view) == {TINY}
    store.remove(PODS, "pod-0", "9")
    assert store.view("pod-0") == RunnerView()
    assert store.set_view("pod-0", view) == NOBODY


def test_pods_that_come_change_or_go_are_told(store: Store) -> None:
    told: list[str] = []
    store.pod_changed = told.append
    store.put(PODS, pod(version=1))
    store.put(PODS, pod(version=1))
    store.put(PODS, pod(version=2))
    store.remove(PODS, "pod-0", "3")
    assert told == ["pod-0"] * 3


def test_a_refused_child_is_tried_again_after_a_growing_back_off() -> None:
    refusals, waits, now = Refusals(), [], NOW
    for _ in range(6):
        refusals.note(TINY, "tiny-0", {"a": 1}, Refusal(403, "quota", now))
        wait = refusals.wait(TINY, "tiny-0", {"a": 1}, now)
        waits.append(wait)
        now += timedelta(seconds=wait)
        assert refusals.wait(TINY, "tiny-0", {"a": 1}, now) == 0
    assert waits == [5, 10, 20, 40, 60, 60]


def test_a_corrected_child_is_tried_at_once() -> None:
    refusals = Refusals()
    refusals.note(TINY, "tiny-0", {"a": 1}, Refusal(422, "invalid", NOW))
    assert refusals.wait(TINY, "tiny-0", {"a": 2}, NOW) == 0


def test_refusals_are_observed_until_they_are_cleared(store: Store) -> None:
    store.put(INSTANCES, instance())
    refusal = Refusal(403, "quota", NOW)
    store.refusals.note(TINY, "tiny-0", {}, refusal)
    observed = store.observed(TINY)
    assert observed is not None
    assert observed.refusals == {"tiny-0": refusal}
    assert store.refusals.clear(TINY, "tiny-0")
    assert replace(observed, refusals={}) == store.observed(TINY)


def test_what_somebody_does_to_an_object_that_was_read_does_not_reach_the_store(store: Store) -> None:
    store.put(PODS, pod())
    read = store.pod("pod-0")
    assert read is not None
    read["metadata"]["labels"].clear()
    again = store.pod("pod-0")
    assert again is not None
    assert again["metadata"]["labels"] == pod()["metadata"]["labels"]
