"""The charts installed, upgraded and removed by the real helm, on an API server of their own."""

import json
from collections.abc import Iterator

import pytest

from mlx_operator_api import names
from tests.apiserver.crd.kubectl import CRD, Kubectl
from tests.cluster import binaries
from tests.cluster.apiserver import ApiServer
from tests.cluster.deploy import NAMESPACE, RELEASE, ROOT, Helm
from tests.cluster.waiting import tell

CRDS_RELEASE = f"{RELEASE}-crds"


@pytest.fixture(scope="module")
def fresh() -> Iterator[ApiServer]:
    """An API server on which nobody has applied anything."""
    with ApiServer(controllers=False, progress=tell) as server:
        yield server


@pytest.fixture(scope="module")
def helm(fresh: ApiServer) -> Helm:
    return Helm(str(binaries.ensure(tell, only={"helm"}) / "helm"), fresh.kubeconfig)


@pytest.fixture(scope="module")
def admin(fresh: ApiServer) -> Kubectl:
    return Kubectl(fresh.binaries / "kubectl", fresh.kubeconfig)


def install_operator(helm: Helm, *values: str) -> str:
    """Without waiting for pods: nothing runs them here."""
    chart = str(ROOT / "helm" / "mlx-operator")
    return helm.run("upgrade", "--install", RELEASE, chart, f"--namespace={NAMESPACE}", "--create-namespace", *values)


def test_without_the_crd_the_notes_say_what_is_missing(helm: Helm) -> None:
    notes = install_operator(helm)
    assert "The CRD was not there" in notes
    assert "helm upgrade --install mlx-operator-crds" in notes


def test_the_crds_install_upgrade_and_outlive_their_release(helm: Helm, admin: Kubectl) -> None:
    helm.install_crds()
    helm.install_crds()
    admin.await_crd(CRD)
    instance = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "kept", "namespace": "default"},
        "spec": {"model": {"source": "pvc://models"}},
    }
    assert admin.apply(instance) == (0, "modelinstance.mlx-operator.dev/kept created")
    helm.run("uninstall", CRDS_RELEASE)
    assert admin.get("mi", "kept")["metadata"]["name"] == "kept"
    helm.install_crds()  # takes the CRD over again


def test_an_upgrade_with_the_crd_has_nothing_to_warn_of_and_changes_only_what_was_set(
    helm: Helm, admin: Kubectl
) -> None:
    install_operator(helm)
    before = admin.get("deployment", RELEASE, "-n", NAMESPACE)
    notes = install_operator(helm, "--set=runner.image.tag=next")
    after = admin.get("deployment", RELEASE, "-n", NAMESPACE)
    assert "The CRD was not there" not in notes
    (old,), (new,) = (item["spec"]["template"]["spec"]["containers"] for item in (before, after))
    assert [argument for argument in new["args"] if argument not in old["args"]] == [
        "--runner-image=localhost/mlx-runner:next"
    ]
    old["args"] = new["args"]
    assert json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def test_uninstalling_the_operator_leaves_its_key(helm: Helm, admin: Kubectl) -> None:
    install_operator(helm)
    admin.run("create", "secret", "generic", "mlx-operator-key", "-n", NAMESPACE, "--from-literal=key=x")
    helm.run("uninstall", RELEASE, f"--namespace={NAMESPACE}")
    assert admin.get("secret", "mlx-operator-key", "-n", NAMESPACE)["metadata"]["name"] == "mlx-operator-key"
    assert admin.get("clusterroles", "-l", f"app.kubernetes.io/instance={RELEASE}")["items"] == []
    assert admin.get("mi", "kept")["metadata"]["name"] == "kept"
