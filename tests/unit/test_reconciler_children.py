"""Children that are created, refused, taken or gone: what is kept for the next plan, and what is tried again."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import PODS, SECRETS, SERVICES, Resource
from mlx_operator.decide.actions import CreatePod, DeletePod, Plan
from mlx_operator_api import names
from mlx_operator_api.status import Status
from tests.unit.reconciling import CREATE, GONE, NOTICE, SERVICE, TINY, Scene, child, failing

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


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


@pytest.mark.parametrize("label", [None, "another"])
async def test_our_own_pod_without_the_label_that_we_watch_by_is_a_refusal_until_the_label_is_back(
    scene: Scene, label: str | None
) -> None:
    unseen = child(PODS, "tiny-0")
    labels = unseen["metadata"]["labels"]
    unseen["metadata"]["labels"] = {**labels, names.INSTANCE_LABEL: label} if label else {}
    pod = scene.kube.put(PODS, unseen)
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    await scene.reconcile()
    await scene.reconcile()
    assert scene.seen[-1].refusals["tiny-0"].status == 409
    assert scene.seen[-1].refusals["tiny-0"].message == (
        "Pod tiny-0 of this ModelInstance exists and lacks the label mlx-operator.dev/instance=tiny"
    )
    assert scene.kube.count("create", "pods") == 1
    scene.store.put(PODS, scene.kube.put(PODS, {**pod, "metadata": {**pod["metadata"], "labels": labels}}))
    await scene.reconcile()
    assert scene.seen[-1].refusals == {}


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


@pytest.mark.parametrize("status", [404, 409])
async def test_a_pod_that_was_gone_when_it_was_to_be_deleted_is_looked_for(scene: Scene, status: int) -> None:
    scene.plans = [Plan(Status(epoch=1), (DeletePod("tiny-0", "pod-0", "its template changed"),))]
    scene.kube.before = failing(("delete", "pods", status))
    await scene.reconcile()
    assert scene.missing == ["pod-0"]


async def test_a_pod_that_is_still_there_after_a_conflict_is_deleted_again(scene: Scene) -> None:
    uid = scene.kube.put(PODS, child(PODS, "tiny-0"))["metadata"]["uid"]
    scene.plans = [Plan(Status(epoch=1), (DeletePod("tiny-0", uid, "its template changed"),))]
    scene.kube.before = failing(("delete", "pods", 409), reason="Conflict")
    with pytest.raises(KubeError):
        await scene.reconcile()
    await scene.reconcile()
    assert ("pods", "default", "tiny-0") not in scene.kube.objects


async def test_a_refused_deletion_is_shown_to_the_next_plan_and_tried_again_later(scene: Scene) -> None:
    pod = scene.kube.put(PODS, child(PODS, "tiny-0"))
    uid = pod["metadata"]["uid"]
    scene.store.put(PODS, pod)
    delete = DeletePod("tiny-0", uid, "its template changed")
    scene.plans = [Plan(Status(epoch=1), (delete,))]
    scene.kube.before = failing(("delete", "pods", 403))
    await scene.reconcile()
    await scene.reconcile()
    assert scene.seen[-1].refusals[uid].status == 403
    assert scene.kube.count("delete", "pods") == 1
    scene.time += timedelta(seconds=5)
    await scene.reconcile()
    assert ("pods", "default", "tiny-0") not in scene.kube.objects
    await scene.reconcile()
    assert scene.seen[-1].refusals == {}


async def test_a_deletion_by_force_is_not_held_up_by_the_refusal_of_an_ordinary_one(scene: Scene) -> None:
    uid = scene.kube.put(PODS, child(PODS, "tiny-0"))["metadata"]["uid"]
    scene.kube.before = failing(("delete", "pods", 403))
    for grace in (None, 0):
        scene.plans = [Plan(Status(epoch=1), (DeletePod("tiny-0", uid, "its node is lost", grace_seconds=grace),))]
        await scene.reconcile()
    assert ("pods", "default", "tiny-0") not in scene.kube.objects


@pytest.mark.parametrize("gone", [False, True])
async def test_the_refusal_of_a_deletion_is_forgotten_once_the_pod_goes(scene: Scene, gone: bool) -> None:
    pod = scene.kube.put(PODS, child(PODS, "tiny-0"))
    uid = pod["metadata"]["uid"]
    scene.store.put(PODS, pod)
    scene.plans = [Plan(Status(epoch=1), (DeletePod("tiny-0", uid, "its template changed"),))]
    scene.kube.before = failing(("delete", "pods", 403))
    await scene.reconcile()
    assert set(scene.store.refusals.of(TINY)) == {uid}
    if gone:
        scene.store.remove(PODS, uid, "9999")
    else:
        later = {**pod["metadata"], "resourceVersion": "9999", "deletionTimestamp": "2026-01-01T00:00:00Z"}
        scene.store.put(PODS, {**pod, "metadata": later})
    assert scene.store.refusals.of(TINY) == {}


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


SLOW = 'Internal error occurred: failed calling webhook "pods.example.com": context deadline exceeded'
NO_TIME = "Timeout: request did not complete within requested timeout - context deadline exceeded"
SECOND = CreatePod("tiny-1", 1, child(PODS, "tiny-1"), "tiny-secret")


@pytest.mark.parametrize(("status", "words"), [(500, SLOW), (504, NO_TIME)], ids=["webhook", "API server"])
async def test_what_ends_by_a_time_out_is_told_and_no_other_child_is_tried_before_it_is_due(
    scene: Scene, status: int, words: str
) -> None:
    late = True

    def before(verb: str, plural: str, _name: str) -> None:
        if (verb, plural) == ("create", "pods") and late:
            raise KubeError(status, "Timeout", words)

    scene.plans = [Plan(Status(epoch=1), (CREATE, SECOND))]
    scene.kube.before = before
    await scene.reconcile()
    await scene.reconcile()
    assert {name: refusal.message for name, refusal in scene.seen[-1].refusals.items()} == {"tiny-0": words}
    assert scene.kube.count("create", "pods") == 1
    scene.time += timedelta(seconds=5)
    await scene.reconcile()
    assert [name for verb, plural, name in scene.kube.requests if (verb, plural) == ("create", "pods")] == [
        "tiny-0"
    ] * 2
    late = False
    scene.time += timedelta(seconds=10)
    await scene.reconcile()
    assert sorted(p["metadata"]["name"] for p in scene.store.pods()) == ["tiny-0", "tiny-1"]
    assert scene.store.refusals.of(TINY) == {}


async def test_a_child_that_the_api_server_made_after_all_is_no_refusal(scene: Scene) -> None:
    scene.plans = [Plan(Status(epoch=1), (CREATE,))]
    scene.kube.before = failing(("create", "pods", 504))
    await scene.reconcile()
    assert scene.store.refusals.of(TINY)["tiny-0"].status == 504
    scene.store.put(PODS, scene.kube.put(PODS, child(PODS, "tiny-0")))
    await scene.reconcile()
    assert scene.seen[-1].refusals == {}


async def test_children_are_waited_for_longer_than_webhooks_may_take(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: dict[str, float] = {}
    create, apply, delete = scene.kube.create, scene.kube.apply, scene.kube.delete

    async def creating(resource: Resource, *rest: Any, seconds: float) -> Any:
        patience[resource.plural] = seconds
        return await create(resource, *rest, seconds=seconds)

    async def applying(resource: Resource, *rest: Any, force: bool, seconds: float) -> Any:
        patience[resource.plural] = seconds
        return await apply(resource, *rest, force=force, seconds=seconds)

    async def deleting(resource: Resource, *rest: Any, seconds: float, **how: Any) -> Any:
        patience["deletion"] = seconds
        return await delete(resource, *rest, seconds=seconds, **how)

    monkeypatch.setattr(scene.kube, "create", creating)
    monkeypatch.setattr(scene.kube, "apply", applying)
    monkeypatch.setattr(scene.kube, "delete", deleting)
    scene.plans = [Plan(Status(epoch=1), (SERVICE, CREATE, DeletePod("tiny-9", "uid-9", "no rank needs it")))]
    await scene.reconcile()
    # The API server ends every such request after 34 s, and no webhook may have more than 30.
    assert set(patience) == {"services", "secrets", "pods", "deletion"}
    assert min(patience.values()) > 34
