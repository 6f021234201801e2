"""The API server on loopback that the other tests of this folder lean on."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.apiserver import ApiServer
from tests.cluster.audit import AuditLog
from tests.cluster.kubeapi import KubeApi
from tests.cluster.network import run_command
from tests.cluster.processes import Record
from tests.cluster.waiting import wait_until

NOBODY = 65534
REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_MAPS = "/api/v1/namespaces/default/configmaps"
# What a killed test leaves: the process holds the server and never ends by itself.
HOLD = "from tests.cluster.apiserver import ApiServer; s = ApiServer(); s.start(); print(s.folder, flush=True); input()"


@pytest.fixture(scope="module")
def own() -> Iterator[ApiServer]:
    """A server that these tests may crash."""
    with ApiServer() as server:
        yield server


def make(api: KubeApi, name: str) -> int:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
    return api.request("POST", CONFIG_MAPS, body)[0]


def test_two_servers_run_at_once_and_know_nothing_of_each_other(own: ApiServer) -> None:
    with ApiServer(controllers=False) as other:
        assert other.port != own.port
        assert make(other.api(), "there") == 201
        assert own.api().request("GET", f"{CONFIG_MAPS}/there")[0] == 404
        folder = other.folder
        records = [Record.read(file) for file in (folder / "records").iterdir()]
        assert len(records) == 2
    assert not folder.exists()
    assert not any(record is not None and record.alive() for record in records)


def test_a_crashed_server_comes_back_on_its_port_with_its_data(own: ApiServer) -> None:
    api, port = own.api(), own.port
    assert make(api, "kept") == 201
    own.stop_apiserver()
    with pytest.raises(OSError, match="refused"):
        api.request("GET", "/readyz")
    own.start_apiserver()
    assert own.port == port
    assert api.request("GET", f"{CONFIG_MAPS}/kept")[0] == 200


def test_every_write_is_in_the_audit_log_when_its_answer_is_there(own: ApiServer) -> None:
    log = AuditLog(own.audit_log)
    mark = log.mark()
    assert [make(own.api(), f"counted-{number}") for number in range(20)] == [201] * 20
    ours = log.writes(mark, user="kubernetes-admin")
    assert [(request.verb, request.resource, request.code) for request in ours] == [("create", "configmaps", 201)] * 20


def test_a_namespace_goes_away_with_what_is_in_it(own: ApiServer) -> None:
    api = own.api()
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "short"}}
    assert api.request("POST", "/api/v1/namespaces", space)[0] == 201
    account = "/api/v1/namespaces/short/serviceaccounts/default"
    wait_until(lambda: api.get(account), what="the namespace has its service account", seconds=30)
    assert api.request("DELETE", "/api/v1/namespaces/short")[0] == 200
    gone = lambda: api.request("GET", "/api/v1/namespaces/short")[0] == 404  # noqa: E731
    wait_until(gone, what="the namespace is gone", seconds=30)


def test_a_user_without_a_role_may_do_nothing(own: ApiServer, tmp_path: Path) -> None:
    kubeconfig = own.user_kubeconfig(tmp_path / "ann", "ann", ["dev"])
    kubectl: list[str | Path] = [own.binaries / "kubectl", f"--kubeconfig={kubeconfig}", f"--cache-dir={tmp_path}"]
    assert "dev" in run_command([*kubectl, "auth", "whoami"])
    answer = subprocess.run([*kubectl, "get", "pods"], capture_output=True, text=True, timeout=30, check=False)
    assert 'User "ann" cannot list resource "pods"' in answer.stderr


def test_what_a_killed_test_left_is_removed_by_the_next_one() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        folder = Path(killed.stdout.readline().strip())
        killed.kill()
    records = [Record.read(file) for file in (folder / "records").iterdir()]
    assert any(record is not None and record.alive() for record in records)
    with ApiServer(controllers=False):
        assert not folder.exists()
        assert not any(record is not None and record.alive() for record in records)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_no_root_is_needed(own: ApiServer) -> None:
    assert own.api().ready(), "this also imports all that the child could not read as somebody else"
    with tempfile.TemporaryDirectory(prefix="mlxop-nobody-", dir="/tmp") as name:
        place = Path(name)
        (place / "bin").mkdir()
        for program in ("etcd", "kube-apiserver"):
            shutil.copy((own.binaries / program).resolve(), place / "bin")
        os.chown(place, NOBODY, NOBODY)
        child = multiprocessing.get_context("fork").Process(target=serve_as_nobody, args=(place,))
        child.start()
        child.join(120)
        child.kill()
        child.join()
        assert (place / "served").read_text() == "65534 True"
        assert not (place / "server").exists()


def serve_as_nobody(place: Path) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with ApiServer(place / "server", binaries=place / "bin", controllers=False) as server:
        (place / "served").write_text(f"{os.geteuid()} {server.api().ready()}")
