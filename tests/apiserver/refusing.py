"""Children that the API server refuses: what the tests of such faults have in common."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mlx_operator.act.kube import CHILD_SECONDS, KubeError
from mlx_operator.act.resources import PODS, Resource
from mlx_operator_api.conditions import ConditionType, Reason
from tests.apiserver.faulting import seen
from tests.apiserver.harness import Manifest, World, eventually, groups_of
from tests.faults import Fault, Layer

_ADMISSION = "admissionregistration.k8s.io"
POLICIES = Resource(_ADMISSION, "v1", "validatingadmissionpolicies", "ValidatingAdmissionPolicy", namespaced=False)
BINDINGS = Resource(
    _ADMISSION, "v1", "validatingadmissionpolicybindings", "ValidatingAdmissionPolicyBinding", namespaced=False
)
REVIEWS = Resource("authorization.k8s.io", "v1", "subjectaccessreviews", "SubjectAccessReview", namespaced=False)
REFUSED = "rank 0/2 pod tiny-0: the API server refused the pod (HTTP 403): pods "
FORBIDDEN = f'{REFUSED}"tiny-0" is forbidden: '
BOTH = "; the same on 2 ranks; "


def row(name: str, what: str, injected: str, says: str, reason: Reason = Reason.POD_REFUSED, **more: Any) -> Fault:
    """A row about a child that is refused."""
    return Fault(
        id=f"kube-{name}",
        what=what,
        injected=injected,
        layer=Layer.OPERATOR,
        state=None,
        reason=reason,
        says=says,
        condition=ConditionType.READY,
        **{"rank": None, "who": "each rank", "within": 3.0, **more},
    )


def manifest(resource: Resource, name: str, **fields: Any) -> Manifest:
    """An object of a kind."""
    return {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": name}, **fields}


@asynccontextmanager
async def present(place: World, resource: Resource, body: Manifest) -> AsyncIterator[None]:
    """An object that is there for a while."""
    namespace = place.namespace if resource.namespaced else None
    made = await place.kube.create(resource, namespace, body)
    try:
        yield
    finally:
        metadata = made["metadata"]
        await place.kube.delete(resource, namespace, metadata["name"], uid=metadata["uid"])


@asynccontextmanager
async def policy(place: World, name: str, operation: str, expression: str, message: str) -> AsyncIterator[None]:
    """A ValidatingAdmissionPolicy for the pods of a test: what the CEL `expression` does not allow is denied."""
    name = f"{name}-{place.namespace}"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": [operation], "resources": ["pods"]}
    spec = {
        "matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": expression, "message": message}],
    }
    here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": place.namespace}}}
    binding = {"policyName": name, "validationActions": ["Deny"], "matchResources": here}
    async with (
        present(place, POLICIES, manifest(POLICIES, name, spec=spec)),
        present(place, BINDINGS, manifest(BINDINGS, name, spec=binding)),
    ):
        yield


async def refused(place: World, words: str, **container: Any) -> None:
    """Wait until the API server refuses pods for this reason: its plugins hear of a policy a moment later."""
    spec = {"containers": [{"name": "c", "image": "c:1", **container}]}
    body = {"metadata": {"name": "probe"}, "spec": spec}

    async def is_refused() -> bool:
        pod = {"apiVersion": "v1", "kind": "Pod", **body}
        try:
            made = await place.kube.create(PODS, place.namespace, pod, seconds=CHILD_SECONDS)
        except KubeError as error:
            return words in error.message
        await place.kube.delete(PODS, place.namespace, "probe", uid=made["metadata"]["uid"], grace_seconds=0)
        return False

    await eventually(is_refused, f"pods are refused: {words}")


async def forbidden(place: World, verb: str, resource: Resource) -> None:
    """Wait until the operator may not do this any more: the API server hears of a changed Role a moment later."""
    what = {"verb": verb, "group": resource.group, "resource": resource.plural, "namespace": place.namespace}
    spec = {"user": place.user, "groups": groups_of(place.user), "resourceAttributes": what}
    review = {"apiVersion": REVIEWS.api_version, "kind": REVIEWS.kind, "metadata": {}, "spec": spec}

    async def is_forbidden() -> bool:
        answer = await place.kube.create(REVIEWS, None, review)
        return not answer["status"]["allowed"]

    await eventually(is_forbidden, f"{place.user} may not {verb} {resource.plural}")


async def told(place: World, row: Fault, **spec: Any) -> None:
    """An instance whose children are refused is told of as the row says, and spends no budget."""
    began = time.monotonic()
    await place.create(**spec)
    instance = await seen(place, row, since=began)
    assert instance["status"].get("restarts", 0) == 0
    assert "history" not in instance["status"]
