"""Configuration files and command lines of the cluster's programs."""

import json
import tomllib
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from tests.cluster import configs, manifests, network
from tests.cluster.audit import AuditLog
from tests.cluster.errors import ClusterError
from tests.cluster.kubeapi import conditions
from tests.cluster.pki import Pki

NODE = Path('/cache/cluster/it\'s "odd"/nodes/n1')


def test_containerds_configuration_is_valid_toml_whatever_the_path() -> None:
    text = configs.containerd(NODE, cni=Path("/bin/cni"), runc="/usr/sbin/runc", snapshotter="overlayfs")
    config = tomllib.loads(text)
    assert config["version"] == 3
    assert config["root"] == str(NODE / "containerd")
    runtime = config["plugins"]["io.containerd.cri.v1.runtime"]
    assert runtime["restrict_oom_score_adj"] is True
    assert runtime["containerd"]["runtimes"]["runc"]["options"]["SystemdCgroup"] is False
    assert config["plugins"]["io.containerd.cri.v1.images"]["pinned_images"]["sandbox"] == "localhost/pause:1"


def test_each_node_has_addresses_of_its_own() -> None:
    nodes = range(1, network.MAX_NODES + 1)
    subnets = {configs.cni(NODE, i)["plugins"][0]["ipam"]["ranges"][0][0]["subnet"] for i in nodes}
    assert len(subnets) == len(nodes)
    assert len({network.node_address(i) for i in nodes} | {network.HUB_ADDRESS}) == len(nodes) + 1
    assert [network.node_index(network.node_name(i)) for i in nodes] == list(nodes)


@pytest.mark.parametrize("name", ["n0", "n21", "n", "hub", "1", "nx", "../n1"])
def test_what_is_not_a_node_name_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="nodes are called n1 to n20"):
        network.node_index(name)


def test_a_kubelet_keeps_to_its_own_cgroup_and_never_collects_images() -> None:
    config = configs.kubelet(NODE, ca=Path("/ca"), resolv_conf=Path("/resolv"), cgroup="/mlxop-x/n1")
    assert config["cgroupRoot"] == "/mlxop-x/n1"
    assert config["imageGCHighThresholdPercent"] == 100
    assert config["clusterDNS"] == [manifests.DNS_ADDRESS]
    assert config["authentication"]["anonymous"] == {"enabled": False}


def test_every_write_is_in_the_audit_log_and_only_reads_are_left_out() -> None:
    *earlier, last = configs.audit_policy()["rules"]
    assert last == {"level": "Metadata"}
    left_out = [rule for rule in earlier if rule["level"] == "None"]
    assert left_out
    assert all(set(rule["verbs"]) <= {"get", "list", "watch"} for rule in left_out)


def test_dns_answers_live_as_long_as_with_kubeadm() -> None:
    [config] = [item for item in manifests.coredns() if item["kind"] == "ConfigMap"]
    assert "cache 30" in config["data"]["Corefile"]


def test_certificates_verify_against_their_authority_and_are_made_once(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    pki.ensure()
    authority = x509.load_pem_x509_certificate(pki.ca.read_bytes())
    certificate, key = pki.issue("server", user="kube-apiserver", hosts=["localhost", "127.0.0.1"])
    leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
    verifier = PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName("localhost"))
    assert verifier.verify(leaf, [])[-1] == authority
    before = certificate.read_bytes(), key.read_bytes(), pki.ca.read_bytes()
    pki.ensure()
    pki.issue("server", user="kube-apiserver", hosts=["localhost"])
    assert (certificate.read_bytes(), key.read_bytes(), pki.ca.read_bytes()) == before
    assert key.stat().st_mode & 0o077 == 0, "only its owner may read a key"


def test_a_kubeconfig_carries_the_user_and_the_groups(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    pki.ensure()
    path = pki.write_kubeconfig(tmp_path / "k", server="https://127.0.0.1:1", user="ann", groups=["dev", "ops"])
    config = json.loads(path.read_text())
    assert config["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:1"
    [file] = (tmp_path / "pki").glob("user-ann*.crt")
    subject = x509.load_pem_x509_certificate(file.read_bytes()).subject.rfc4514_string()
    assert subject == "CN=ann,O=ops,O=dev"


def test_the_audit_log_is_read_from_a_mark_without_the_line_that_is_being_written(tmp_path: Path) -> None:
    def event(verb: str, resource: str, user: str = "ann") -> str:
        target = {"resource": resource, "namespace": "default", "name": "x"}
        return json.dumps(
            {"verb": verb, "user": {"username": user}, "objectRef": target, "responseStatus": {"code": 200}}
        )

    path = tmp_path / "audit.log"
    log = AuditLog(path)
    assert log.mark() == 0
    path.write_text(event("create", "pods") + "\n")
    mark = log.mark()
    lines = [event("get", "pods"), event("patch", "pods", "bob"), event("update", "leases"), event("delete", "pods")]
    path.write_text(path.read_text() + "\n".join(lines) + "\n" + event("delete", "pods")[:20])
    assert [request.verb for request in log.writes(mark)] == ["patch", "delete"]
    assert [request.verb for request in log.writes(mark, leases=True)] == ["patch", "update", "delete"]
    assert [request.user for request in log.writes(mark, user="bob")] == ["bob"]
    assert [request.verb for request in log.requests(mark, verbs=["get"], resources=["pods"])] == ["get"]
    assert len(log.writes()) == 3


def test_conditions_of_nothing_are_no_conditions() -> None:
    assert conditions(None) == {}
    assert conditions({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}) == {"Ready": "True"}
