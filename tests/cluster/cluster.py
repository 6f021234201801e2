"""The cluster for tests and for the command line: its life and the faults that can be done to it."""

import contextlib
import fcntl
import functools
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster import images, manifests, prerequisites
from tests.cluster.access import ClusterAccess
from tests.cluster.cgroups import Group
from tests.cluster.errors import ClusterError
from tests.cluster.hub import Hub
from tests.cluster.kubeapi import KubeApi, conditions
from tests.cluster.load import load_archives
from tests.cluster.network import HUB, MAX_NODES, node_name, run_command
from tests.cluster.node import Node
from tests.cluster.paths import DEFAULT_NAME
from tests.cluster.processes import Record
from tests.cluster.waiting import Progress, ended, silent, tell, wait_until

_COREDNS = "/apis/apps/v1/namespaces/kube-system/deployments/coredns"
_LOCK_SECONDS = 300.0
_NODE_READY_SECONDS = 120.0
_DNS_SECONDS = 60.0


class Cluster(ClusterAccess):
    """A local Kubernetes cluster.

    Args:
        name: clusters of different names run beside each other.
        nodes: number of nodes for `up`; None keeps those that are there, two for a new cluster.
        port: loopback port of the API server; 0 for any free one.
        progress: receives a line now and then.
        binaries: folder of the programs; built or taken from the cache when None.

    Raises:
        ClusterError: the name or the number of nodes cannot be.
    """

    def __init__(
        self,
        name: str = DEFAULT_NAME,
        nodes: int | None = None,
        *,
        port: int = 0,
        progress: Progress = tell,
        binaries: Path | None = None,
    ) -> None:
        if nodes is not None and not 1 <= nodes <= MAX_NODES:
            raise ClusterError(f"--nodes {nodes}: a cluster has 1 to {MAX_NODES} nodes.")
        super().__init__(name, progress=progress, binaries=binaries)
        self._wanted = nodes
        self._port = port

    def up(self) -> None:
        """Bring the cluster up, or what is missing of one that is: idempotent, and it heals faults that were injected.

        Raises:
            ClusterError: something is missing, or did not come up by its deadline.
        """
        prerequisites.check_cluster(self.paths.root, port=0 if self.running("front") else self._port)
        system = images.ensure_system(self._progress)
        begun = time.monotonic()
        hub = self.hub
        with self._locked():
            nodes = self._planned_nodes()
            self.paths.root.mkdir(parents=True, exist_ok=True, mode=0o755)
            (self.paths.root / "resolv.conf").write_text(f"nameserver {manifests.DNS_ADDRESS}\n")
            hub.start()
            port = hub.start_front(self._port)
            # Containers' runtimes come up, and unpack what every pod needs, while the API server starts.
            for node in nodes:
                node.start_runtime()
            for node in nodes:
                node.wait_for_runtime()
            self._tell_routes(nodes)
            load_archives(nodes, list(system.values()), silent)
            hub.wait(port)
            api = hub.api(port)
            before = {node.name: self._start_agents(api, hub, node) for node in nodes}
            api.apply(manifests.coredns())
            for node in nodes:
                self._wait_ready(api, node, before[node.name])
            self._progress(f"{len(nodes)} nodes are Ready after {time.monotonic() - begun:.1f} s")
            self._wait_dns(api, nodes)

    def down(self) -> None:
        """Remove everything of this cluster, whatever state it is in: processes, namespaces, mounts, cgroups, files.

        Raises:
            ClusterError: something could not be removed, with what it is.
        """
        with self._locked():
            top = Group(f"mlxop-{self.name}")
            top.kill()
            for record in self._records():
                record.stop(grace=0)
            for member in self.network.members():
                self.network.remove(member)
            top.remove()
            self._unmount()
            if self.paths.root.exists():
                shutil.rmtree(self.paths.root)

    def load_image(self, *archives: Path) -> None:
        """Make the images of archives known to all running nodes; only what a node lacks is copied.

        Args:
            archives: OCI layout folders, OCI archives, docker-archives.
        """
        load_archives([node for node in self.nodes() if not node.stopped], archives, self._progress)

    def partition(self, node: str) -> None:
        """Cut a node off the network; everything on it goes on running."""
        self.network.link(self.node(node).name, up=False)

    def heal(self, node: str) -> None:
        """Undo `partition`."""
        self.network.link(self.node(node).name, up=True)

    def stop_node(self, node: str) -> None:
        """Take a node's power away: nothing of it runs afterwards, and nobody was told."""
        with self._locked():
            self.node(node).power_off()

    def start_node(self, node: str, *, wait: bool = True) -> None:
        """Give a stopped node its power back.

        Args:
            node: its name.
            wait: return when the API server sees it Ready again.
        """
        hub = self.hub
        api = hub.api(hub.port())
        with self._locked():
            started = self.node(node)
            started.start_runtime()
            started.wait_for_runtime()
            self._tell_routes([started])
            before = self._start_agents(api, hub, started)
        if wait:
            self._wait_ready(api, started, before)

    def _planned_nodes(self) -> list[Node]:
        there = len(self.nodes())
        wanted = self._wanted or there or 2
        if wanted < there:
            raise ClusterError(
                f"Cluster {self.name!r} has {there} nodes, more than --nodes {wanted}: run `down` first, "
                "or leave --nodes out."
            )
        return [Node(node_name(index), self.paths, self.binaries) for index in range(1, wanted + 1)]

    def _tell_routes(self, nodes: Sequence[Node]) -> None:
        members = [member for member in self.network.members() if member != HUB]
        for node in nodes:
            for member in members:
                if member != node.name:
                    self.network.add_route(member, node.index)

    def _start_agents(self, api: KubeApi, hub: Hub, node: Node) -> str | None:
        """Start what runs beside containerd; return when an ended kubelet was last heard whose word still stands."""
        stands = _ready(api, node) and not node.record("kubelet")
        before = _renewed(api, node) if stands else None
        node.start_agents(hub.pki)
        return before

    def _wait_ready(self, api: KubeApi, node: Node, before: str | None) -> None:
        component = node.component("kubelet")

        def ready() -> bool:
            if not self.running(component):
                raise ended(component, self.paths.log(component))
            # Ready may be the word of a kubelet that ended a moment ago: a new one is there when it renews the Lease.
            heard = before is None or _renewed(api, node) != before
            return heard and _ready(api, node)

        wait_until(
            ready,
            what=f"node {node.name} is Ready",
            seconds=_NODE_READY_SECONDS,
            log=self.paths.log(component),
            progress=self._progress,
        )

    def _wait_dns(self, api: KubeApi, nodes: Sequence[Node]) -> None:
        wait_until(
            lambda: conditions(api.get(_COREDNS)).get("Available") == "True",
            what="CoreDNS is Available",
            seconds=_DNS_SECONDS,
            progress=self._progress,
        )
        for node in nodes:
            wait_until(
                functools.partial(self._serves, node.name),
                what=f"the Service of DNS answers on {node.name}",
                seconds=_DNS_SECONDS,
                log=self.paths.log(node.component("proxy")),
                progress=self._progress,
            )

    def _serves(self, node: str) -> bool:
        """Whether a connection to the Service of DNS comes about: kube-proxy writes its rules a moment later."""
        probe = f"import socket; socket.create_connection(({manifests.DNS_ADDRESS!r}, 53), 2).close()"
        return self.run_in(node, [sys.executable, "-I", "-S", "-c", probe], check=False).returncode == 0

    def _records(self) -> list[Record]:
        folder = self.paths.records
        found = [Record.read(file) for file in folder.iterdir()] if folder.is_dir() else []
        return [record for record in found if record is not None]

    def _unmount(self) -> None:
        """Nodes mount in a namespace of their own, so there is nothing here, unless somebody shared it by hand."""
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            where = Path(line.split()[4].replace("\\040", " "))
            if where.is_relative_to(self.paths.root):
                run_command(["umount", "--lazy", where])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time; the kernel drops the lock of a process that dies."""
        if missing := prerequisites.missing_root():
            raise ClusterError(missing[0])
        self.paths.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            wait_until(
                lambda: _try_lock(descriptor),
                what=f"the other command on cluster {self.name!r} is done",
                seconds=_LOCK_SECONDS,
                progress=self._progress,
            )
            yield
        finally:
            os.close(descriptor)


def _ready(api: KubeApi, node: Node) -> bool:
    return conditions(api.get(f"/api/v1/nodes/{node.name}")).get("Ready") == "True"


def _renewed(api: KubeApi, node: Node) -> str:
    """Return when a kubelet last renewed the node's Lease, "" for never."""
    lease = api.get(f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{node.name}")
    return "" if lease is None else str(lease["spec"].get("renewTime", ""))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
