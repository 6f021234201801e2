"""One API server for all tests of this folder, with the CRD applied as a user would."""

from collections.abc import Iterator

import pytest

from tests.apiserver.crd.kubectl import CRD, Kubectl
from tests.cluster.apiserver import ApiServer
from tests.cluster.deploy import ROOT
from tests.cluster.waiting import tell


@pytest.fixture(scope="session")
def server() -> Iterator[ApiServer]:
    """The API server, with the controllers that aggregate roles."""
    with ApiServer(progress=tell) as server:
        yield server


@pytest.fixture(scope="session")
def kubectl(server: ApiServer) -> Kubectl:
    """The administrator's kubectl; the CRD is established."""
    kubectl = Kubectl(server.binaries / "kubectl", server.kubeconfig)
    assert "created" in kubectl.run("apply", "-f", str(ROOT / "crds"))
    kubectl.await_crd(CRD)
    return kubectl
