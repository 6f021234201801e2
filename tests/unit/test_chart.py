"""The charts as helm renders them. Skipped where the helm of the local cluster was not built yet."""

import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mlx_operator.options import parse
from mlx_operator_api import crd, names

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPERATOR = ROOT / "helm" / "mlx-operator"
CRDS = ROOT / "helm" / "mlx-operator-crds"
NAMESPACE = "mlx-operator-system"
Manifest = dict[str, Any]


@pytest.fixture(scope="session")
def helm() -> str:
    """A helm program that is already there; building one takes minutes and is not this test's business."""
    from tests.cluster import binaries
    from tests.cluster.paths import cache_root

    built = cache_root() / "bin" / f"helm-{binaries.program_key('helm')}" / "helm" if shutil.which("go") else None
    program = str(built) if built and built.exists() else shutil.which("helm")
    if program is None:
        pytest.fail("no helm: build it with python -m tests.cluster.binaries helm, or install Helm")
    return program


def rendered(helm: str, chart: pathlib.Path, *arguments: str) -> list[Manifest]:
    """The objects of a chart."""
    argv = [helm, "template", "mlx-operator", str(chart), f"--namespace={NAMESPACE}", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def refusal(helm: str, *arguments: str) -> str:
    """What helm says of values that it refuses."""
    argv = [helm, "template", "mlx-operator", str(OPERATOR), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    return done.stderr


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [item for item in manifests if item["kind"] == kind]


def deployment(manifests: list[Manifest]) -> Manifest:
    (found,) = of_kind(manifests, "Deployment")
    return found


def container(manifests: list[Manifest]) -> Manifest:
    spec: Manifest = deployment(manifests)["spec"]["template"]["spec"]
    (found,) = spec["containers"]
    assert isinstance(found, dict)
    return found


def granted(manifests: list[Manifest], kind: str) -> Iterator[tuple[str, str, str]]:
    """(group, resource, verb) of every role of a kind that is not meant for people."""
    for role in of_kind(manifests, kind):
        if any("aggregate-to" in label for label in role["metadata"]["labels"]):
            continue
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    yield from ((group, resource, verb) for verb in rule["verbs"])


@pytest.mark.parametrize("chart", [OPERATOR, CRDS], ids=["operator", "crds"])
def test_lint_finds_nothing(helm: str, chart: pathlib.Path) -> None:
    done = subprocess.run([helm, "lint", "--strict", str(chart)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


def test_the_crds_chart_installs_the_generated_crd_and_keeps_it(helm: str) -> None:
    (definition,) = rendered(helm, CRDS)
    assert definition["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert definition == crd.definition()


def test_the_crd_can_be_given_up_with_the_chart(helm: str) -> None:
    (definition,) = rendered(helm, CRDS, "--set=keep=false")
    assert definition == crd.definition()


def test_the_defaults_make_one_of_each_kind(helm: str) -> None:
    kinds = sorted(item["kind"] for item in rendered(helm, OPERATOR))
    assert kinds == sorted(
        ["Deployment", "ServiceAccount", "Service", "NetworkPolicy", "Role", "RoleBinding", "ClusterRoleBinding"]
        + ["ClusterRole"] * 4
    )


def test_names_and_ports_are_those_of_the_shared_contract(helm: str) -> None:
    text = yaml.safe_dump_all(rendered(helm, OPERATOR, "--set=networkPolicy.runnerNamespaces={models}"))
    assert names.INSTANCE_LABEL in text
    policy = next(
        item
        for item in yaml.safe_load_all(text)
        if item["kind"] == "NetworkPolicy" and item["metadata"]["namespace"] == "models"
    )
    ports = [(port["port"], port.get("endPort")) for rule in policy["spec"]["ingress"] for port in rule["ports"]]
    last = names.RING_PORT_BASE + names.RING_PORT_COUNT - 1
    expected = [(names.PUBLIC_PORT, None), (names.CONTROL_PORT, None), (names.FRAME_PORT, None)]
    assert ports == [*expected, (names.RING_PORT_BASE, last)]


def test_the_operator_gets_its_images_and_its_namespace(helm: str) -> None:
    values = ["image.repository=r/op", "image.tag=v7", "runner.image.repository=r/run", "runner.image.pullPolicy=Never"]
    got = container(rendered(helm, OPERATOR, *[f"--set={value}" for value in values]))
    assert got["image"] == "r/op:v7"
    assert got["args"] == [
        "--namespace=$(POD_NAMESPACE)",
        "--runner-image=r/run:0.1.0",
        "--runner-image-pull-policy=Never",
        "--leader-elect",
        "--log-level=info",
        "--log-format=logfmt",
    ]


@pytest.mark.parametrize(
    "values",
    [[], ["watchNamespaces={a,b}"], ["leaderElection.enabled=false", "log.format=json", "log.level=debug"]],
    ids=str,
)
def test_the_operator_reads_its_arguments_as_the_chart_means_them(helm: str, values: list[str]) -> None:
    given = [argument for value in values for argument in (f"--set={value}",)]
    arguments = [
        argument.replace("$(POD_NAMESPACE)", NAMESPACE)
        for argument in container(rendered(helm, OPERATOR, *given))["args"]
    ]
    options = parse(arguments, {"POD_NAME": "p"})
    assert options.namespace == NAMESPACE
    assert options.runner_image == "localhost/mlx-runner:0.1.0"
    assert options.watch_namespaces == (("a", "b") if "watchNamespaces={a,b}" in values else ())
    assert options.leader_elect is ("leaderElection.enabled=false" not in values)
    assert options.log_format == ("json" if "log.format=json" in values else "logfmt")


def test_ports_and_names_are_the_operators_own_defaults(helm: str) -> None:
    manifests = rendered(helm, OPERATOR)
    options = parse(["--runner-image=i", "--namespace=n"], {})
    assert options.probes_bind and options.metrics_bind
    ports = {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}
    assert ports == {"probes": options.probes_bind.port, "metrics": options.metrics_bind.port}
    held = {
        (rule["resources"][0], name)
        for role in of_kind(manifests, "Role")
        for rule in role["rules"]
        for name in rule.get("resourceNames", ())
    }
    assert held == {("secrets", options.key_secret), ("leases", options.lease_name)}


def test_the_operators_pod_is_fit_for_pod_security_restricted(helm: str) -> None:
    spec = deployment(rendered(helm, OPERATOR))["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = spec["containers"][0]["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert all("hostPath" not in volume for volume in spec["volumes"])


def test_every_rule_stands_with_its_reason() -> None:
    for file in ("_rules.tpl", "rbac.yaml", "aggregated-roles.yaml"):
        lines = (OPERATOR / "templates" / file).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if line.strip().startswith("- apiGroups:"):
                assert lines[number - 1].strip().startswith("#"), f"{file}:{number + 1}: a rule without a reason"


def test_no_rule_has_a_wildcard_or_reads_secrets_of_others(helm: str) -> None:
    manifests = rendered(helm, OPERATOR)
    everywhere = set(granted(manifests, "ClusterRole"))
    assert not [grant for grant in everywhere if "*" in grant]
    assert {verb for _, resource, verb in everywhere if resource == "secrets"} == {"create"}
    for role in of_kind(manifests, "Role"):
        for rule in role["rules"]:
            if "secrets" in rule["resources"] and rule["verbs"] != ["create"]:
                assert rule["resourceNames"] == ["mlx-operator-key"]
                assert rule["verbs"] == ["get"]


def test_confined_to_namespaces_there_is_no_clusterrole_and_no_access_to_nodes(helm: str) -> None:
    everywhere = rendered(helm, OPERATOR)
    confined = rendered(helm, OPERATOR, "--set=watchNamespaces={a,b}")
    assert not set(granted(confined, "ClusterRole"))
    assert not of_kind(confined, "ClusterRoleBinding")
    served = [role for role in of_kind(confined, "Role") if role["metadata"]["namespace"] != NAMESPACE]
    assert [role["metadata"]["namespace"] for role in served] == ["a", "b"]
    nodes = {grant for grant in granted(everywhere, "ClusterRole") if grant[1] == "nodes"}
    assert set(granted(served, "Role")) == set(granted(everywhere, "ClusterRole")) - nodes
    assert [arg for arg in container(confined)["args"] if "watch" in arg] == [
        "--watch-namespace=a",
        "--watch-namespace=b",
    ]


def test_without_leader_election_two_operators_never_run_at_once(helm: str) -> None:
    manifests = rendered(helm, OPERATOR, "--set=leaderElection.enabled=false")
    assert deployment(manifests)["spec"]["strategy"] == {"type": "Recreate"}
    assert "--no-leader-elect" in container(manifests)["args"]
    told = refusal(helm, "--set=leaderElection.enabled=false", "--set=replicas=2")
    assert (
        "replicas is 2 while leaderElection.enabled is false, so that 2 operators would act at once: "
        "set replicas to 1, or leaderElection.enabled to true"
    ) in told
    assert deployment(rendered(helm, OPERATOR, "--set=leaderElection.enabled=false", "--set=replicas=0"))


def test_two_releases_share_no_cluster_wide_name(helm: str) -> None:
    def cluster_names(namespace: str) -> set[str]:
        manifests = rendered(helm, OPERATOR, f"--namespace={namespace}")
        return {item["metadata"]["name"] for item in manifests if item["kind"].startswith("ClusterRole")}

    assert not cluster_names("one") & cluster_names("two")


def test_the_selector_of_the_deployment_matches_its_pods_and_its_policy(helm: str) -> None:
    manifests = rendered(helm, OPERATOR, "--set=podLabels.team=ml")
    labels = deployment(manifests)["spec"]["template"]["metadata"]["labels"]
    for selector in (
        deployment(manifests)["spec"]["selector"]["matchLabels"],
        of_kind(manifests, "NetworkPolicy")[0]["spec"]["podSelector"]["matchLabels"],
        of_kind(manifests, "Service")[0]["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()
    assert labels["team"] == "ml"
    assert not any(label.startswith(names.GROUP) for label in labels), "the operator would take itself for a runner"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("replica=2", "replica"),
        ("log.level=verbose", "level"),
        ("runner.image.pullPolicy=Sometimes", "pullPolicy"),
        ("watchNamespaces={Bad_Name}", "watchNamespaces"),
        ("networkPolicy.apiServerPorts={}", "apiServerPorts"),
        ("replicas=two", "replicas"),
    ],
)
def test_a_value_that_is_unknown_or_wrong_is_refused_by_name(helm: str, value: str, word: str) -> None:
    assert word in refusal(helm, f"--set={value}")
