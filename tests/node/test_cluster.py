"""The local cluster itself: nodes, faults, and that nothing is left behind. Its name is its own, so others may run."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cgroups import ROOT, Group
from tests.cluster.cluster import Cluster
from tests.cluster.kubeapi import conditions
from tests.cluster.manifests import COREDNS_IMAGE, DNS_ADDRESS
from tests.cluster.network import node_address, node_index
from tests.cluster.processes import Record
from tests.cluster.tests.layouts import layer, oci_layout
from tests.cluster.waiting import wait_until

NAME, CRASHING = "self", "self-crash"
REPOSITORY = Path(__file__).resolve().parents[2]
# Places that kubelet, containerd, runc and CNI plugins make for themselves on an ordinary node.
HOST_PLACES = (
    *(f"/var/lib/{name}" for name in ("kubelet", "cni", "containerd")),
    *(f"/run/{name}" for name in ("containerd", "runc", "xtables.lock", "cni", "flannel")),
    *(
        "/var/log/pods",
        "/var/log/containers",
        "/etc/cni",
        "/etc/kubernetes",
        "/usr/libexec/kubernetes",
        "/opt/containerd",
    ),
)
# Other programs keep networks of theirs beside these; containerd calls those of its pods cni-….
POD_NETWORKS = "/run/netns/cni-*"
SYSCTLS = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops")


def traces(name: str) -> list[str]:
    """Everything on this machine that belongs to a cluster of this name."""
    cluster = Cluster(name)
    marks = (f"mlxop-{name}/", f"{cluster.paths.root}/")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            about = (process / "cgroup").read_text() + (process / "cmdline").read_text(errors="replace")
            mounts = (process / "mountinfo").read_text()
        except OSError:
            continue
        if any(mark in about for mark in marks):
            found.append(f"process {process.name}: {about}")
        if str(cluster.paths.root) in mounts:
            found.append(f"mount seen by process {process.name}")
    found += [f"cgroup {folder}" for folder in ROOT.glob(f"*/mlxop-{name}")]
    found += [f"files {cluster.paths.root}"] if cluster.paths.root.exists() else []
    return found


def namespaces_in_use() -> dict[int, Path]:
    """Network namespaces that a process is in: {number: its file below the process with the lowest id}."""
    found: dict[int, Path] = {}
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
        file = process / "ns" / "net"
        try:
            found.setdefault(file.stat().st_ino, file)
        except OSError:
            continue
    return found


def host() -> dict[str, object]:
    """What a node must not change on this machine."""
    places: dict[str, object] = {
        place: sorted(os.listdir(place)) if Path(place).is_dir() else None for place in HOST_PLACES
    }
    places[POD_NETWORKS] = sorted(glob(POD_NETWORKS))
    return places | {name: Path("/proc/sys", name).read_text() for name in SYSCTLS}


def ready(cluster: Cluster, node: str) -> str:
    """Status of a node's Ready condition."""
    return conditions(cluster.api().get(f"/api/v1/nodes/{node}")).get("Ready", "")


def dns_pod(cluster: Cluster) -> dict[str, Any]:
    """The pod of CoreDNS; where that is just being moved, the new one once it serves."""

    def serving() -> dict[str, Any] | None:
        pods = json.loads(cluster.kubectl("get", "pods", "-n", "kube-system", "-o", "json"))["items"]
        stay = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
        return next((pod for pod in stay if conditions(pod).get("Ready") == "True"), None)

    return wait_until(serving, what="a pod of CoreDNS serves", seconds=60)


def faithful_pod(cluster: Cluster, node: str) -> str:
    """Make a pod that stays on its node however long that is away (CoreDNS does not), and return its uid."""
    container = {
        "name": "dns",
        "image": COREDNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-dns.port", "1053"],
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "faithful"},
        "spec": {
            "nodeName": node,
            "tolerations": [{"operator": "Exists"}],
            "automountServiceAccountToken": False,
            "containers": [container],
        },
    }
    made = cluster.kubectl("create", "-n", "default", "-f", "-", "-o", "json", stdin=json.dumps(pod))
    return str(json.loads(made)["metadata"]["uid"])


@pytest.fixture(scope="module")
def before() -> dict[str, object]:
    """The host before any cluster of this module."""
    Cluster(NAME).down()
    Cluster(CRASHING).down()
    return host()


@pytest.fixture(scope="module")
def nodes(before: dict[str, object]) -> Iterator[Cluster]:
    """Two nodes."""
    cluster = Cluster(NAME, 2)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture
def crashing() -> Iterator[Cluster]:
    """A cluster whose `up` is killed by the test."""
    cluster = Cluster(CRASHING, 2)
    yield cluster
    cluster.down()


def test_two_nodes_are_ready_and_dns_answers_through_its_service(nodes: Cluster) -> None:
    assert [ready(nodes, node) for node in ("n1", "n2")] == ["True", "True"]
    items = json.loads(nodes.kubectl("get", "nodes", "-o", "json"))["items"]
    assert {item["metadata"]["labels"]["kubernetes.io/hostname"] for item in items} == {"n1", "n2"}
    for node in ("n1", "n2"):
        with nodes.forward(DNS_ADDRESS, 53, node=node) as address:
            assert dns_address(address, "kubernetes.default.svc.cluster.local") == "10.96.0.1"
        assert node_address(node_index(node)) in nodes.run_in(node, ["ip", "-4", "addr", "show", "eth0"]).stdout


def test_a_second_up_changes_nothing_and_is_quick(nodes: Cluster) -> None:
    pids = {component: Record.read(nodes.paths.record(component)) for component in nodes.components()}
    assert all(record is not None and record.alive() for record in pids.values())
    kubeconfig = nodes.kubeconfig.read_text()
    Cluster(NAME).up()
    assert {component: Record.read(nodes.paths.record(component)) for component in nodes.components()} == pids
    assert nodes.kubeconfig.read_text() == kubeconfig


def test_up_repairs_what_was_killed(nodes: Cluster) -> None:
    address = nodes.kubeconfig.read_text()
    killed = ["kubelet-n1", "front", "scheduler", "containerd-n2"]
    for component in killed:
        record = Record.read(nodes.paths.record(component))
        assert record is not None
        record.stop(grace=0)
    Cluster(NAME).up()
    assert all(nodes.running(component) for component in nodes.components())
    assert nodes.kubeconfig.read_text() == address, "clients that have the address keep it"


def test_processes_and_cpu_time_of_a_pod_are_found_by_its_name_and_uid(nodes: Cluster) -> None:
    pod = dns_pod(nodes)
    node, name, uid = pod["spec"]["nodeName"], f"kube-system/{pod['metadata']['name']}", pod["metadata"]["uid"]
    [(pid, line)] = nodes.container_pids(node, name)
    assert line.startswith("/coredns")
    assert nodes.container_pids(node, uid) == nodes.container_pids(node, name, container="coredns") == [(pid, line)]
    assert pid in Group(f"mlxop-{NAME}/{node}").pids()
    assert 0 < nodes.pod_cpu_seconds(node, uid) < 60
    other = "n2" if node == "n1" else "n1"
    assert nodes.container_pids(other, uid) == []


def test_an_image_with_one_changed_layer_brings_only_that_layer(nodes: Cluster, tmp_path: Path) -> None:
    lines: list[str] = []
    cluster = Cluster(NAME, progress=lines.append)
    base, name = layer(base=os.urandom(8 << 20)), {"org.opencontainers.image.ref.name": "localhost/thin:1"}
    cluster.load_image(oci_layout(tmp_path / "one", [base, layer(code=b"1")], name))
    assert (
        sorted(line.rpartition(":")[2].split()[0] for line in lines if "localhost/thin:1 is on n" in line)
        == ["8.0"] * 2
    )
    lines.clear()
    changed = oci_layout(tmp_path / "two", [base, layer(code=b"2")], name)
    cluster.load_image(changed)
    assert (
        sorted(line.rpartition(":")[2].split()[0] for line in lines if "localhost/thin:1 is on n" in line)
        == ["0.0"] * 2
    )
    lines.clear()
    cluster.load_image(changed)
    assert lines == [], "an image that is there is not touched"


def test_a_partitioned_node_becomes_not_ready_and_comes_back_with_its_pods(nodes: Cluster) -> None:
    kubelet = nodes.node_pid("n2")
    nodes.partition("n2")
    wait_until(lambda: ready(nodes, "n2") == "Unknown", what="n2 is not Ready", seconds=60)
    assert ready(nodes, "n1") == "True"
    nodes.heal("n2")
    wait_until(lambda: ready(nodes, "n2") == "True", what="n2 is Ready again", seconds=60)
    assert nodes.node_pid("n2") == kubelet, "a partition kills nothing"


def test_a_node_asks_no_nameserver_of_the_host(nodes: Cluster) -> None:
    pull = nodes.node("n1").ctr("images", "pull", "registry.invalid/none:1")
    pulled = subprocess.run(pull, capture_output=True, text=True, timeout=60, check=False)
    assert "lookup registry.invalid on 127.0.0.1:53" in pulled.stderr, pulled.stderr


def test_up_plugs_a_node_in_that_was_cut_off(nodes: Cluster) -> None:
    nodes.partition("n2")
    assert not nodes.network.linked("n2")
    Cluster(NAME).up()
    assert nodes.network.linked("n2")


def test_a_stopped_node_runs_nothing_and_starts_again(nodes: Cluster) -> None:
    node = "n2"
    uid = faithful_pod(nodes, node)
    wait_until(lambda: nodes.container_pids(node, uid), what="the pod runs", seconds=60)
    group = Group(f"mlxop-{NAME}/{node}")
    assert len(group.pids()) > 4, "three daemons, a shim, a container"
    nodes.stop_node(node)
    assert group.pids() == []
    assert not any(nodes.running(f"{daemon}-{node}") for daemon in ("kubelet", "containerd", "proxy"))
    nodes.start_node(node)
    assert ready(nodes, node) == "True"
    wait_until(
        lambda: any("/coredns" in line for _, line in nodes.container_pids(node, uid)),
        what="the pod runs again",
        seconds=60,
    )


def test_down_leaves_nothing_and_the_host_as_it_was(nodes: Cluster, before: dict[str, object]) -> None:
    networks = {nodes.network.path(member).stat().st_ino for member in nodes.network.members()}
    assert len(networks) == 3
    in_use = namespaces_in_use()
    assert networks <= in_use.keys()
    assert traces(NAME)
    assert host() == before, "not even while it runs"
    with ExitStack() as stack:
        for network in networks:
            # An open file keeps the number from being given to a new namespace of somebody else.
            stack.enter_context(in_use[network].open())
        nodes.down()
        assert traces(NAME) == []
        assert not networks & namespaces_in_use().keys()
    assert host() == before
    nodes.down()


@pytest.mark.parametrize("point", ["netns/hub", "records/etcd", "records/containerd-n1", "records/kubelet-n1"])
def test_down_is_clean_after_up_was_killed(point: str, crashing: Cluster, before: dict[str, object]) -> None:
    kill_up_at(point, crashing)
    crashing.down()
    assert traces(CRASHING) == []
    assert host() == before


def test_up_goes_on_where_a_killed_up_was(crashing: Cluster) -> None:
    kill_up_at("netns/n1", crashing)
    crashing.up()
    assert [ready(crashing, node) for node in ("n1", "n2")] == ["True", "True"]


def kill_up_at(point: str, cluster: Cluster) -> None:
    """Start `up` in a process of its own and kill that once a file of the cluster is there."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cluster", "--name", cluster.name, "up"],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            wait_until((cluster.paths.root / point).exists, what=f"{point} is there", seconds=60, interval=0.001)
            assert process.poll() is None, "it was killed too late to mean anything"
        finally:
            # With the short programs that it has just started: they would go on making things beside `down`.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def dns_address(server: tuple[str, int], name: str) -> str:
    """Ask a DNS server over TCP for an IPv4 address (RFC 1035, 4.2.2: two bytes of length before each message)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)
    with socket.create_connection(server, timeout=10) as connection:
        connection.sendall(struct.pack(">H", len(question)) + question)
        with connection.makefile("rb") as stream:
            answer = stream.read(struct.unpack(">H", stream.read(2))[0])
    # The address is what the answer ends with: its record is the last, and the server adds no additional ones.
    return socket.inet_ntoa(answer[-4:])
