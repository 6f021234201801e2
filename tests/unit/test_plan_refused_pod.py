"""A pod that the API server refuses is told with the fields of the ModelInstance, not with those of the pod."""

from typing import Any

import pytest

from mlx_operator.decide.observed import Refusal
from mlx_operator_api.conditions import ConditionType, Reason
from tests.unit.scenes import condition
from tests.unit.simulator import START, Cluster

ENV = [{"name": "MLX_INSTANCE_UID", "value": "x"}, {"name": "A", "value": "1"}, {"name": "B", "valueFrom": {}}]
REFUSALS: dict[str, tuple[int, str, str]] = {
    "a toleration": (
        422,
        'Pod "tiny-0" is invalid: spec.tolerations[0].key: Invalid value: "a b": name part must consist of …',
        'invalid: spec.runner.tolerations[0].key: Invalid value: "a b"',
    ),
    "several fields": (
        422,
        'Pod "tiny-0" is invalid: [metadata.labels: Invalid value: "a b", spec.nodeSelector: Invalid value: "c d"]',
        'invalid: [spec.runner.podLabels: Invalid value: "a b", spec.runner.nodeSelector: Invalid value: "c d"]',
    ),
    "resources": (
        422,
        'Pod "tiny-0" is invalid: spec.containers[0].resources.requests: Invalid value: "2Gi": must be less than or '
        "equal to memory limit of 1Gi",
        'invalid: spec.runner.resources.requests: Invalid value: "2Gi": must be less',
    ),
    "annotations": (
        422,
        'Pod "tiny-0" is invalid: metadata.annotations: Too long',
        "invalid: spec.runner.podAnnotations: Too long",
    ),
    "a type": (
        400,
        'Pod in version "v1" cannot be handled as a Pod: json: cannot unmarshal string into Go struct field '
        "Affinity.spec.affinity.nodeAffinity of type v1.NodeAffinity",
        "cannot be handled as a Pod: spec.runner.affinity.nodeAffinity: cannot be a string",
    ),
    "an unknown field": (
        400,
        'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field "spec.affinity.nodeAf"',
        'unknown field "spec.runner.affinity.nodeAf"',
    ),
    "a priority class": (
        403,
        'pods "tiny-0" is forbidden: no PriorityClass with name high was found',
        "forbidden: spec.runner.priorityClassName: no PriorityClass with name high was found",
    ),
    "a runtime class": (
        403,
        'pods "tiny-0" is forbidden: pod rejected: RuntimeClass "gvisor" not found',
        'forbidden: spec.runner.runtimeClassName: pod rejected: RuntimeClass "gvisor" not found',
    ),
    "a service account": (
        403,
        'pods "tiny-0" is forbidden: error looking up service account ns/x: serviceaccount "x" not found',
        "forbidden: spec.runner.serviceAccountName: error looking up service account ns/x",
    ),
}


@pytest.mark.parametrize(("status", "message", "told"), REFUSALS.values(), ids=REFUSALS)
def test_the_users_own_field_is_named(status: int, message: str, told: str) -> None:
    cluster = Cluster()
    cluster.refuse = Refusal(status, message, START)
    cluster.run()
    stalled = condition(cluster, ConditionType.STALLED)
    assert (stalled.status, stalled.reason) == ("True", Reason.POD_REFUSED)
    assert told in stalled.message
    cluster.refuse = None
    cluster.run()
    assert cluster.ready()


def _index(cluster: Cluster, name: str) -> int:
    cluster.reconcile()
    (environment, *_) = (pod.manifest["spec"]["containers"][0]["env"] for pod in cluster.pods.values())
    return next(i for i, variable in enumerate(environment) if variable["name"] == name)


@pytest.mark.parametrize(
    ("variable", "model", "field"),
    [
        ("B", {}, "spec.runner.env[2].valueFrom"),
        ("MLX_INSTANCE_UID", {}, "spec.runner.env[0].valueFrom"),
        ("MLX_RUNNER_RANK", {}, "spec.runner.env.valueFrom"),
        ("HF_TOKEN", {"credentialsSecretRef": {"name": "t"}}, "spec.model.credentialsSecretRef.valueFrom"),
    ],
)
def test_a_variable_is_found_among_those_of_the_operator(variable: str, model: dict[str, Any], field: str) -> None:
    spec: dict[str, Any] = {"model": {"source": "hf://org/tiny", **model}, "runner": {"env": ENV}}
    place = _index(Cluster(runners=1, **spec), variable)
    cluster = Cluster(runners=1, **spec)
    message = f'Pod "tiny-0" is invalid: spec.containers[0].env[{place}].valueFrom: Invalid value: ""'
    cluster.refuse = Refusal(422, message, START)
    cluster.run()
    assert f"invalid: {field}: Invalid value" in condition(cluster, ConditionType.READY).message
