"""Pods that the operator may not delete: who refuses it, and that it goes on by itself once it may."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES, PODS
from mlx_operator_api.conditions import ConditionType, Reason
from tests.apiserver.faulting import seen
from tests.apiserver.harness import Manifest, World, condition, eventually, is_ready
from tests.apiserver.refusing import policy, row
from tests.faults import Fault, fault

KEPT = "pods are kept"
NOT_BY_THE_OPERATOR = "!request.userInfo.username.startsWith('system:serviceaccount:') && request.name != 'probe'"


@asynccontextmanager
async def kept(place: World) -> AsyncIterator[None]:
    """The API server refuses that the operator deletes pods: it hears of a policy, and of its end, a moment later."""
    spec = {"containers": [{"name": "c", "image": "c:1"}]}
    pod: Manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": spec}

    async def deleted() -> bool:
        try:
            known = await place.kube.get(PODS, place.namespace, "probe")
        except KubeError:
            known = await place.kube.create(PODS, place.namespace, pod)
        try:
            await place.kube.delete(PODS, place.namespace, "probe", uid=known["metadata"]["uid"], grace_seconds=0)
        except KubeError as error:
            if KEPT not in error.message:
                raise
            return False
        return True

    async def refused() -> bool:
        return not await deleted()

    try:
        async with policy(place, "keep", "DELETE", NOT_BY_THE_OPERATOR, KEPT):
            await eventually(refused, "deletions are refused")
            yield
    finally:
        # Also after a failure: the probe that was refused its deletion would outlive the test.
        await eventually(deleted, "deletions are allowed again")


async def change(place: World, **spec: Any) -> None:
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": spec})


@fault(
    row(
        "deletion-refused",
        "admission policy denies the deletion of pods",
        "a ValidatingAdmissionPolicy against deletions by the operator, then a change that needs new pods",
        'rank 0/1 pod tiny-0 on node n1: the API server refused to delete it (HTTP 422): pods "tiny-0" is forbidden: '
        f"ValidatingAdmissionPolicy 'keep…' with binding 'keep…' denied request: {KEPT}; let the "
        "ValidatingAdmissionPolicy keep… allow the operator to delete pods, or do it: kubectl delete pod tiny-0",
        Reason.POD_STUCK,
        rank=0,
        ranks=1,
        who="",
        then="the user: changes the policy, or deletes the pods",
    )
)
async def test_a_pod_that_may_not_be_replaced_is_told_with_who_refuses_it(place: World, row: Fault) -> None:
    operator = await place.operator()
    await place.create(runners=1)
    before = await place.until_ready()
    async with kept(place):
        began = time.monotonic()
        await change(place, runner={"podLabels": {"team": "b"}})
        instance = await seen(place, row, since=began)
        assert instance["status"].get("restarts", 0) == 0
        assert "history" not in instance["status"]
    after = await place.until(
        lambda i: is_ready(i) and i["status"]["runners"][0]["podUID"] != before["status"]["runners"][0]["podUID"],
        "Ready with new pods",
    )
    assert condition(after, ConditionType.STALLED)["status"] == "False"
    assert "reconcile failed" not in operator.lines()


async def test_a_suspended_instance_whose_pods_may_not_be_deleted_says_so(place: World) -> None:
    await place.operator()
    await place.create(runners=1)
    await place.until_ready()
    async with kept(place):
        await change(place, suspend=True)
        instance = await place.until(
            lambda i: condition(i, ConditionType.STALLED).get("reason") == Reason.POD_STUCK, "Stalled"
        )
        assert KEPT in condition(instance, ConditionType.STALLED)["message"]
        assert condition(instance, ConditionType.READY)["reason"] == Reason.SUSPENDED
    await place.until(
        lambda i: condition(i, ConditionType.STALLED)["reason"] == Reason.SUSPENDED, "nothing is in the way"
    )
