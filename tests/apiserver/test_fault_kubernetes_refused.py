"""Children that the API server refuses, and names that are taken: its own words, and the step that helps."""

# ruff: noqa: E501 (the texts are compared word by word)

from mlx_operator.act.resources import INSTANCES, PODS, SERVICES, Resource
from mlx_operator_api.conditions import Reason
from tests.apiserver import injection
from tests.apiserver.harness import CONFINED_RELEASE, World
from tests.apiserver.refusing import (
    BOTH,
    FORBIDDEN,
    REFUSED,
    forbidden,
    manifest,
    policy,
    present,
    refused,
    row,
    told,
)
from tests.faults import Fault, fault

ROLES = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")


@fault(
    row(
        "quota",
        "ResourceQuota exhausted",
        "a ResourceQuota with `pods: 0`",
        f"{FORBIDDEN}exceeded quota: tight, requested: pods=1, used: pods=0, limited: pods=0{BOTH}raise the "
        "ResourceQuota tight, free what it counts, or lower spec.runner.resources or spec.runners",
    )
)
async def test_a_quota_is_told_with_its_name_and_its_end_is_noticed(place: World, row: Fault) -> None:
    await place.operator()
    hard = {"pods": "0"}
    async with present(place, injection.QUOTAS, manifest(injection.QUOTAS, "tight", spec={"hard": hard})):
        # Without its controller the quota's status is the test's to write.
        status = {"status": {"hard": hard, "used": {"pods": "0"}}}
        await place.kube.merge_patch(injection.QUOTAS, place.namespace, "tight", status, subresource="status")
        await told(place, row)
    await place.until_ready()


@fault(
    row(
        "limit-range",
        "LimitRange of the namespace exceeded",
        "a LimitRange with 1 GiB at most, and a spec that asks for 2 GiB",
        f"{FORBIDDEN}maximum memory usage per Container is 1Gi, but limit is 2Gi{BOTH}keep spec.runner.resources within "
        "the LimitRange of the namespace, or change that",
    )
)
async def test_a_limit_range_is_told_and_its_end_is_noticed(place: World, row: Fault) -> None:
    await place.operator()
    limits = {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]}
    async with present(place, injection.LIMITS, manifest(injection.LIMITS, "small", spec=limits)):
        resources = {"limits": {"memory": "2Gi"}}
        await refused(place, "maximum memory usage", resources=resources)
        await told(place, row, runner={"resources": resources})
    await place.until_ready()


@fault(
    row(
        "service-account",
        "ServiceAccount missing",
        "spec.runner.serviceAccountName names one that does not exist",
        f'{FORBIDDEN}spec.runner.serviceAccountName: error looking up service account …/robot: serviceaccount "robot" not found{BOTH}create the '
        "ServiceAccount robot in the namespace of the ModelInstance, or correct spec.runner.serviceAccountName",
    )
)
async def test_a_missing_service_account_is_named_and_its_creation_is_noticed(place: World, row: Fault) -> None:
    await place.operator()
    await told(place, row, runner={"serviceAccountName": "robot"})
    async with present(place, injection.ACCOUNTS, manifest(injection.ACCOUNTS, "robot")):
        await place.until_ready()


@fault(
    row(
        "priority-class",
        "PriorityClass missing",
        "spec.runner.priorityClassName names one that does not exist",
        f"{FORBIDDEN}spec.runner.priorityClassName: no PriorityClass with name gold was found{BOTH}create the PriorityClass gold, or correct "
        "spec.runner.priorityClassName",
        then="the user: creates it, or corrects the spec",
    )
)
async def test_a_missing_priority_class_is_named_and_a_corrected_spec_heals(place: World, row: Fault) -> None:
    await place.operator()
    await told(place, row, runner={"priorityClassName": "gold"})
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": {"runner": None}})
    await place.until_ready()


@fault(
    row(
        "admission-policy",
        "admission policy denies the pods",
        "a ValidatingAdmissionPolicy that demands a memory limit",
        'rank 0/2 pod tiny-0: the API server refused the pod (HTTP 422): pods "tiny-0" is forbidden: '
        "ValidatingAdmissionPolicy 'limits…' with binding 'limits…' denied request: a memory limit is required"
        f"{BOTH}correct spec.runner so that the ValidatingAdmissionPolicy limits… allows the pod, or change the policy",
        then="the user: corrects the spec or the policy",
    )
)
async def test_an_admission_policy_is_told_by_name_and_a_spec_that_it_allows_heals(place: World, row: Fault) -> None:
    await place.operator()
    limited = (
        "object.spec.containers.all(c, has(c.resources) && has(c.resources.limits) && 'memory' in c.resources.limits)"
    )
    async with policy(place, "limits", "CREATE", limited, "a memory limit is required"):
        await refused(place, "a memory limit is required")
        await told(place, row)
        enough = {"spec": {"runner": {"resources": {"limits": {"memory": "1Gi"}}}}}
        await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", enough)
        await place.until_ready()


@fault(
    row(
        "rbac",
        "the operator's permissions are missing",
        "the verb `create` for pods taken from its Role",
        f'{REFUSED}is forbidden: User "system:serviceaccount:…" cannot create resource "pods" in API group "" in the '
        f'namespace "…"{BOTH}give the operator its permission back (helm upgrade does): kubectl auth can-i '
        "create pods --as system:serviceaccount:…",
    )
)
async def test_a_missing_permission_of_the_operator_is_told_and_its_return_is_noticed(place: World, row: Fault) -> None:
    place.confine()
    (role,) = [
        item
        for item in (await place.kube.list(ROLES, place.namespace))[0]
        if CONFINED_RELEASE in item["metadata"]["name"]
    ]
    rules = [dict(rule) for rule in role["rules"]]
    for rule in rules:
        if "pods" in rule["resources"]:
            rule["verbs"] = [verb for verb in rule["verbs"] if verb != "create"]
    assert rules != role["rules"]
    await place.operator(f"--watch-namespace={place.namespace}")
    await place.kube.merge_patch(ROLES, place.namespace, role["metadata"]["name"], {"rules": rules})
    await forbidden(place, "create", PODS)
    await told(place, row)
    place.confine()
    await place.until_ready()


@fault(
    row(
        "foreign-pod",
        "a foreign pod under our name",
        "a pod named `tiny-1` that belongs to nobody",
        "rank 1/2 pod tiny-1: Pod tiny-1 exists and belongs to nobody that it names; delete or rename the object that the "
        "message names, or rename the ModelInstance",
        Reason.CHILD_CONFLICT,
        rank=1,
        who="",
    )
)
async def test_a_foreign_pod_is_named_and_left_alone(place: World, row: Fault) -> None:
    await place.operator()
    spec = {"containers": [{"name": "theirs", "image": "theirs:1"}]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tiny-1"}, "spec": spec}
    made = await place.kube.create(PODS, place.namespace, body)
    place.kubelet.held.add("tiny-0")
    place.kubelet.why["tiny-0"] = ("ContainerCreating", "")
    await told(place, row)
    assert (await place.kube.get(PODS, place.namespace, "tiny-1"))["metadata"]["uid"] == made["metadata"]["uid"]
    await place.kube.delete(PODS, place.namespace, "tiny-1", uid=made["metadata"]["uid"], grace_seconds=0)
    injection.released(place)
    await place.until_ready()


@fault(
    row(
        "foreign-service",
        "a foreign Service under our name",
        "a Service named `tiny` that belongs to nobody",
        "Service tiny exists and belongs to nobody that it names; delete or rename the object that the message names, or rename the "
        "ModelInstance",
        Reason.CHILD_CONFLICT,
        who="the group",
    )
)
async def test_a_foreign_service_is_named_and_left_alone(place: World, row: Fault) -> None:
    await place.operator()
    injection.held(place, "ContainerCreating", "", "tiny-0", "tiny-1")
    spec = {"selector": {"app": "theirs"}, "ports": [{"port": 80}]}
    async with present(place, SERVICES, manifest(SERVICES, "tiny", spec=spec)):
        await told(place, row)
        left = await place.kube.get(SERVICES, place.namespace, "tiny")
        assert left["spec"]["selector"] == {"app": "theirs"}
    injection.released(place)
    await place.until_ready()
