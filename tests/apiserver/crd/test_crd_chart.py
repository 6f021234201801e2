"""The chart on a real API server: what its roles allow, what they do not, and whether its pod is admitted."""

import json
import subprocess
import time
from functools import partial
from typing import Any

import pytest
import yaml

from tests.apiserver.crd.kubectl import Kubectl
from tests.cluster import binaries
from tests.cluster.apiserver import ApiServer
from tests.cluster.deploy import NAMESPACE, RELEASE, ROOT
from tests.cluster.waiting import tell, wait_until

OPERATOR = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
CONFINED_NAMESPACE = "confined-system"
CONFINED = f"system:serviceaccount:{CONFINED_NAMESPACE}:{RELEASE}"
MLX, EVENTS, LEASES = "mlx-operator.dev", "events.k8s.io", "coordination.k8s.io"


def install(kubectl: Kubectl, namespace: str, *values: str) -> list[dict[str, Any]]:
    """Apply the rendered chart in a namespace that enforces PodSecurity `restricted`; returns its objects."""
    helm = binaries.ensure(tell, only={"helm"}) / "helm"
    argv = [str(helm), "template", RELEASE, str(ROOT / "helm" / "mlx-operator"), f"--namespace={namespace}", *values]
    text = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}
    kubectl.run("apply", "-f", "-", stdin=json.dumps(space))
    kubectl.run("apply", "-f", "-", stdin=text)
    return [item for item in yaml.safe_load_all(text) if item]


@pytest.fixture(scope="module")
def chart(kubectl: Kubectl, server: ApiServer) -> list[dict[str, Any]]:
    """The chart with its defaults; returns when the API server has read its roles."""
    objects = install(kubectl, NAMESPACE)
    await_roles(server, OPERATOR, NEEDED[0], NEEDED[-1])
    return objects


@pytest.fixture(scope="module")
def confined(kubectl: Kubectl, server: ApiServer) -> list[dict[str, Any]]:
    """The chart for the namespace `team` alone; returns when the API server has read its roles."""
    kubectl.run("create", "namespace", "team")
    objects = install(kubectl, CONFINED_NAMESPACE, "--set=watchNamespaces={team}")
    lease = ("update", LEASES, "leases", CONFINED_NAMESPACE, "mlx-operator")
    await_roles(server, CONFINED, ("list", "", "pods", "team"), lease)
    return objects


def may(server: ApiServer, user: str, groups: list[str], attributes: dict[str, str]) -> bool:
    """The API server's own answer to a SubjectAccessReview."""
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "groups": groups, "resourceAttributes": attributes},
    }
    code, answer = server.api().request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body)
    assert code == 201, answer
    allowed: bool = json.loads(answer)["status"]["allowed"]
    return allowed


def attributes(verb: str, group: str, resource: str, namespace: str = "", name: str = "") -> dict[str, str]:
    """Of a request; `resource` may have a subresource."""
    kind, _, subresource = resource.partition("/")
    given = {
        "verb": verb,
        "group": group,
        "resource": kind,
        "subresource": subresource,
        "namespace": namespace,
        "name": name,
    }
    return {key: text for key, text in given.items() if text}


def operator_may(server: ApiServer, user: str, *request: str) -> bool:
    namespace = user.split(":")[2]
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    return may(server, user, groups, attributes(*request))


def await_roles(server: ApiServer, user: str, *requests: tuple[str, ...]) -> None:
    """Wait until one request of each role is allowed: the API server hears of a role a moment after it is stored."""
    for request in requests:
        wait_until(partial(operator_may, server, user, *request), what=f"{user} may {' '.join(request)}", seconds=30)


NEEDED = [
    # what it watches, cluster-wide
    *((verb, MLX, "modelinstances") for verb in ("get", "list", "watch")),
    *((verb, "", "pods") for verb in ("list", "watch")),
    *((verb, "", "services") for verb in ("list", "watch")),
    *((verb, "", "nodes") for verb in ("list", "watch")),
    # what it writes
    ("patch", MLX, "modelinstances/status", "team", "tiny"),
    ("get", "", "pods", "team", "tiny-0"),
    ("create", "", "pods", "team"),
    ("delete", "", "pods", "team", "tiny-0"),
    ("create", "", "services", "team"),
    ("patch", "", "services", "team", "tiny"),
    ("get", "", "services", "team", "tiny"),
    ("create", "", "secrets", "team"),
    ("list", "", "events", "team"),
    ("create", EVENTS, "events", "team"),
    ("get", EVENTS, "events", "team", "x"),
    ("patch", EVENTS, "events", "team", "x"),
    # its own namespace
    ("get", "", "secrets", NAMESPACE, "mlx-operator-key"),
    ("create", "", "secrets", NAMESPACE),
    ("create", LEASES, "leases", NAMESPACE),
    ("get", LEASES, "leases", NAMESPACE, "mlx-operator"),
    ("update", LEASES, "leases", NAMESPACE, "mlx-operator"),
]
DENIED = [
    # other people's Secrets, in any way that shows their data
    *((verb, "", "secrets") for verb in ("list", "watch", "deletecollection")),
    *((verb, "", "secrets", "team", "tiny-token") for verb in ("get", "patch", "update", "delete")),
    *((verb, "", "secrets", NAMESPACE) for verb in ("list", "watch")),
    *((verb, "", "secrets", NAMESPACE, "mlx-operator-key") for verb in ("patch", "update", "delete")),
    ("get", "", "secrets", NAMESPACE, "another"),
    # acting inside pods, or on those of others
    *(("create", "", f"pods/{sub}", "team", "p") for sub in ("exec", "attach", "portforward", "eviction", "binding")),
    ("get", "", "pods/log", "team", "p"),
    ("patch", "", "pods", "team", "p"),
    ("update", "", "pods", "team", "p"),
    ("patch", "", "pods/ephemeralcontainers", "team", "p"),
    ("deletecollection", "", "pods", "team"),
    # users' intent
    *((verb, MLX, "modelinstances", "team", "tiny") for verb in ("update", "patch", "delete")),
    ("create", MLX, "modelinstances", "team"),
    ("update", MLX, "modelinstances/status", "team", "tiny"),
    ("update", MLX, "modelinstances/finalizers", "team", "tiny"),
    # anything that would raise its own power
    ("create", "", "serviceaccounts/token", "team", "default"),
    ("create", "rbac.authorization.k8s.io", "rolebindings", "team"),
    ("escalate", "rbac.authorization.k8s.io", "clusterroles"),
    ("impersonate", "", "serviceaccounts"),
    # the rest
    ("delete", "", "services", "team", "tiny"),
    ("patch", "", "nodes", "", "n1"),
    ("get", "", "nodes/proxy", "", "n1"),
    ("get", "", "configmaps", "team", "c"),
    ("get", "", "persistentvolumeclaims", "team", "models"),
    ("list", "", "namespaces"),
    ("list", "apiextensions.k8s.io", "customresourcedefinitions"),
    ("update", LEASES, "leases", NAMESPACE, "another"),
    ("get", LEASES, "leases", "kube-system", "mlx-operator"),
    ("create", "apps", "deployments", "team"),
]


@pytest.mark.parametrize("request_", NEEDED, ids=" ".join)
def test_the_operator_may(server: ApiServer, chart: object, request_: tuple[str, ...]) -> None:
    assert operator_may(server, OPERATOR, *request_)


@pytest.mark.parametrize("request_", DENIED, ids=" ".join)
def test_the_operator_may_not(server: ApiServer, chart: object, request_: tuple[str, ...]) -> None:
    assert not operator_may(server, OPERATOR, *request_)


@pytest.mark.parametrize(
    ("request_", "allowed"),
    [
        (("list", "", "pods", "team"), True),
        (("watch", MLX, "modelinstances", "team"), True),
        (("patch", MLX, "modelinstances/status", "team", "x"), True),
        (("create", "", "secrets", "team"), True),
        (("get", "", "secrets", CONFINED_NAMESPACE, "mlx-operator-key"), True),
        (("create", "", "secrets", CONFINED_NAMESPACE), True),
        (("update", LEASES, "leases", CONFINED_NAMESPACE, "mlx-operator"), True),
        (("list", "", "pods"), False),
        (("list", "", "pods", "default"), False),
        (("list", "", "pods", CONFINED_NAMESPACE), False),
        (("create", "", "secrets", "default"), False),
        (("list", MLX, "modelinstances"), False),
        (("list", "", "nodes"), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_confined_to_a_namespace_the_operator_may_only_there(
    server: ApiServer, confined: object, request_: tuple[str, ...], allowed: bool
) -> None:
    assert operator_may(server, CONFINED, *request_) is allowed


@pytest.fixture(scope="module")
def people(kubectl: Kubectl, server: ApiServer, chart: object) -> None:
    """Users bound to Kubernetes' own roles; returns when the controller has aggregated ours into them."""
    for role in ("view", "edit", "admin"):
        kubectl.run("create", "rolebinding", f"{role}er", f"--clusterrole={role}", f"--user={role}er", "-n", "default")
    deadline = time.monotonic() + 30
    last = attributes("deletecollection", MLX, "modelinstances", "default")
    while not (
        may(server, "adminer", [], last)
        and may(server, "editer", [], attributes("create", MLX, "modelinstances", "default"))
        and may(server, "viewer", [], attributes("get", MLX, "modelinstances", "default", "x"))
    ):
        assert time.monotonic() < deadline, "our roles were not aggregated in 30 s"


@pytest.mark.parametrize(
    ("user", "verbs"),
    [
        ("viewer", {"get", "list", "watch"}),
        ("editer", {"get", "list", "watch", "create", "update", "patch", "delete"}),
        ("adminer", {"get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"}),
    ],
)
def test_people_get_model_instances_with_the_roles_they_have(
    server: ApiServer, people: None, user: str, verbs: set[str]
) -> None:
    every = ["get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"]
    granted = {verb for verb in every if may(server, user, [], attributes(verb, MLX, "modelinstances", "default"))}
    assert granted == verbs
    assert may(server, user, [], attributes("get", MLX, "modelinstances/status", "default", "x"))
    assert not may(server, user, [], attributes("patch", MLX, "modelinstances/status", "default", "x"))


def test_the_operators_pod_passes_pod_security_restricted(kubectl: Kubectl, chart: list[dict[str, Any]]) -> None:
    (deployment,) = [item for item in chart if item["kind"] == "Deployment"]
    pod = {"apiVersion": "v1", "kind": "Pod", **deployment["spec"]["template"]}
    pod["metadata"] = {**pod["metadata"], "name": "probe", "namespace": NAMESPACE}
    status, output = kubectl.apply(pod, dry_run=True)
    assert (status, output) == (0, "pod/probe created (server dry run)")
    pod["spec"] = {**pod["spec"], "hostNetwork": True}
    status, output = kubectl.apply(pod, dry_run=True)
    assert status == 1 and "violates PodSecurity" in output, "the namespace does not enforce anything"


def test_everything_in_the_chart_is_accepted_again(kubectl: Kubectl, chart: list[dict[str, Any]]) -> None:
    output = kubectl.run("apply", "-f", "-", stdin=yaml.safe_dump_all(chart))
    assert len(output.splitlines()) == len(chart)
    assert [line for line in output.splitlines() if not line.endswith("unchanged")] == []


def test_the_policies_for_runner_pods_are_accepted(kubectl: Kubectl) -> None:
    helm = binaries.ensure(tell, only={"helm"}) / "helm"
    values = "--set=networkPolicy.runnerNamespaces={default}"
    argv = [
        str(helm),
        "template",
        RELEASE,
        str(ROOT / "helm" / "mlx-operator"),
        values,
        "-s=templates/networkpolicy.yaml",
    ]
    text = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    output = kubectl.run("apply", "--dry-run=server", "-f", "-", stdin=text)
    assert "networkpolicy.networking.k8s.io/mlx-operator-runners created" in output
