"""Pods that have to go and whose deletion the API server refuses: who refuses it, what it holds up, what to do."""

from typing import Any

import pytest

from mlx_operator.decide.observed import Refusal
from mlx_operator_api.conditions import ConditionType, Reason
from tests.unit.scenes import condition, ready
from tests.unit.simulator import START, Cluster

POLICY = "pods \"tiny-0\" is forbidden: ValidatingAdmissionPolicy 'keep' with binding 'all' denied request: pods stay"
DENIED = 'admission webhook "keep.example.com" denied the request: pods stay'
SLOW = 'Internal error occurred: failed calling webhook "keep.example.com": context deadline exceeded'
RBAC = (
    'pods "tiny-0" is forbidden: User "system:serviceaccount:mlx:mlx-operator" cannot delete resource "pods" in API '
    'group "" in the namespace "default"'
)


def refused(status: int = 422, message: str = POLICY, **change: Any) -> Cluster:
    """A group of two that serves, whose pods cannot be deleted when its spec changes."""
    cluster = ready()
    cluster.keep = Refusal(status, message, START)
    cluster.change(**change)
    cluster.run(20)
    return cluster


@pytest.mark.parametrize(
    ("status", "message", "lasting", "advice"),
    [
        (422, POLICY, True, "let the ValidatingAdmissionPolicy keep allow the operator to delete pods"),
        (403, DENIED, True, "let the admission webhook keep.example.com allow the operator to delete pods"),
        (500, SLOW, False, "see why the admission webhook keep.example.com does not answer in its time"),
        (504, "Timeout: request did not complete", False, "look for a slow admission webhook, or an API server with"),
        (403, RBAC, True, "give the operator its permission back (helm upgrade does): kubectl auth can-i delete pods"),
        (403, "pods stay here", True, "see in the message who refuses it, and let the operator delete pods"),
    ],
)
def test_a_pod_that_may_not_be_replaced_is_told_with_who_refuses_it(
    status: int, message: str, lasting: bool, advice: str
) -> None:
    cluster = refused(status, message, runner={"image": "runner:2"})
    told = condition(cluster, ConditionType.READY)
    assert (told.status, told.reason) == ("False", Reason.POD_STUCK)
    did = "did not finish in its time" if status == 504 else "refused"
    assert (
        f"rank 0/2 pod tiny-0 on node n1: the API server {did} to delete it (HTTP {status}): {message}" in told.message
    )
    assert f"; {advice}" in told.message
    assert cluster.stalled() is lasting
    cluster.keep = None
    cluster.run()
    assert cluster.ready()
    assert not cluster.stalled()


def test_a_change_that_is_taken_back_needs_no_deletion_any_more() -> None:
    cluster = refused(runner={"image": "runner:2"})
    assert cluster.stalled()
    cluster.change(runner={"image": None})
    cluster.run()
    assert cluster.ready()
    assert not cluster.stalled()


def test_a_suspended_instance_tells_of_a_pod_that_stays() -> None:
    cluster = refused(suspend=True)
    told = condition(cluster, ConditionType.STALLED)
    assert (told.status, told.reason) == ("True", Reason.POD_STUCK)
    assert told.message.startswith("pod tiny-0 on node n1, which no rank needs: the API server refused to delete it")
    assert condition(cluster, ConditionType.READY).reason is Reason.SUSPENDED
    cluster.keep = None
    cluster.run(until=lambda: not cluster.pods)
    cluster.run(5)
    assert not cluster.stalled()
    assert condition(cluster, ConditionType.RECONCILING).message == "suspended: there is nothing to do"


def test_a_group_that_got_smaller_serves_and_tells_of_the_pod_that_stays() -> None:
    cluster = Cluster(runners=3)
    cluster.run()
    assert cluster.ready()
    cluster.keep = Refusal(422, POLICY, START)
    cluster.change(runners=1)
    cluster.run()
    assert cluster.ready()
    assert not cluster.stalled()
    told = condition(cluster, ConditionType.RECONCILING)
    assert (told.status, told.reason) == ("True", Reason.POD_STUCK)
    assert told.message.startswith("pod tiny-1 on node n2, which no rank needs: the API server refused to delete it")
    cluster.keep = None
    cluster.run(until=lambda: set(cluster.pods) == {"tiny-0"})
    cluster.run(5)
    assert condition(cluster, ConditionType.RECONCILING).reason is Reason.RECONCILED
