"""The cluster for tests and for the command line: control plane, nodes, faults, and a way in from the host."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster import binaries as programs
from tests.cluster import cgroups, images, manifests, prerequisites
from tests.cluster.cgroups import Group
from tests.cluster.errors import ClusterError
from tests.cluster.hub import COMPONENTS, Hub
from tests.cluster.kubeapi import KubeApi, conditions
from tests.cluster.load import load_archives
from tests.cluster.network import HUB, MAX_NODES, Network, node_index, node_name
from tests.cluster.node import DAEMONS, Node, forward_command
from tests.cluster.paths import DEFAULT_NAME, ClusterPaths
from tests.cluster.pki import Pki
from tests.cluster.processes import Record, command_line, spawn
from tests.cluster.waiting import Progress, ended, tell, wait_until

_LOCK_SECONDS = 300.0
_NODE_READY_SECONDS = 120.0
_DNS_SECONDS = 60.0


class Cluster:
    """A local Kubernetes cluster.

    Args:
        name: clusters of different names run beside each other.
        nodes: number of nodes for `up`; None keeps those that are there, two for a new cluster.
        port: loopback port of the API server; 0 for any free one.
        progress: receives a line now and then.
        binaries: folder of the programs; built or taken from the cache when None.
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
        self.paths = ClusterPaths(name)
        self.network = Network(name)
        self._wanted = nodes
        self._port = port
        self._progress = progress
        self._binaries = binaries

    @property
    def name(self) -> str:
        """The cluster's name."""
        return self.paths.name

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig, for programs on this machine."""
        return self.paths.kubeconfig

    @property
    def audit_log(self) -> Path:
        """The API server's audit log: Metadata level, a JSON event per line; see ``tests.cluster.audit``."""
        return self.paths.audit_log

    @property
    def binaries(self) -> Path:
        """Folder of kubectl, helm and the cluster's own programs."""
        if self._binaries is None:
            self._binaries = programs.ensure(self._progress)
        return self._binaries

    # Life ---------------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Bring the cluster up, or what is missing of one that is: idempotent, and it heals faults that were injected.

        Raises:
            ClusterError: something is missing, or did not come up by its deadline.
        """
        prerequisites.check_cluster(self.paths.root, port=0 if self._hub_runs() else self._port)
        begun = time.monotonic()
        system = images.ensure_system(self._progress)
        hub = Hub(self.paths, self.binaries, self._progress)
        with self._locked():
            nodes = self._planned_nodes()
            self.paths.root.mkdir(parents=True, exist_ok=True, mode=0o755)
            (self.paths.root / "resolv.conf").write_text(f"nameserver {manifests.DNS_ADDRESS}\n")
            hub.start()
            port = hub.start_front(self._port)
            for node in nodes:
                node.start_runtime()
            for node in nodes:
                node.wait_for_runtime()
            self._tell_routes(nodes)
            load_archives(nodes, list(system.values()), lambda line: None)
            hub.wait(port)
            for node in nodes:
                self.network.link(node.name, up=True)
                node.start_agents(hub.pki)
            api = hub.api(port)
            api.apply(manifests.coredns())
            for node in nodes:
                self._wait_ready(api, node)
            self._progress(f"{len(nodes)} nodes are Ready after {time.monotonic() - begun:.1f} s")
            wait_until(
                lambda: conditions(api.get(_COREDNS)).get("Available") == "True",
                what="CoreDNS is Available",
                seconds=_DNS_SECONDS,
                progress=self._progress,
            )

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

    # Faults -------------------------------------------------------------------------------------------------------

    def partition(self, node: str) -> None:
        """Cut a node off the network; everything on it goes on running."""
        self.network.link(self._node(node).name, up=False)

    def heal(self, node: str) -> None:
        """Undo `partition`."""
        self.network.link(self._node(node).name, up=True)

    def stop_node(self, node: str) -> None:
        """Take a node's power away: nothing of it runs afterwards, and nobody was told."""
        with self._locked():
            self._node(node).power_off()

    def start_node(self, node: str, *, wait: bool = True) -> None:
        """Give a stopped node its power back.

        Args:
            node: its name.
            wait: return when the API server sees it Ready again.
        """
        hub = Hub(self.paths, self.binaries, self._progress)
        port = hub.port()
        with self._locked():
            started = self._node(node)
            started.start_runtime()
            started.wait_for_runtime()
            self._tell_routes([started])
            started.start_agents(hub.pki)
        if wait:
            self._wait_ready(hub.api(port), started)

    # Looking in ---------------------------------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Return the nodes of this cluster, running or not."""
        folder = self.paths.root / "nodes"
        names = sorted((f.name for f in folder.iterdir()), key=node_index) if folder.is_dir() else []
        return [Node(name, self.paths, self.binaries) for name in names]

    def running(self, component: str) -> bool:
        """Whether a component such as ``etcd`` or ``kubelet-n1`` runs."""
        record = Record.read(self.paths.record(component))
        return record is not None and record.alive()

    def components(self) -> list[str]:
        """Return the names of all components that should run."""
        return [*COMPONENTS, *(node.component(daemon) for node in self.nodes() for daemon in DAEMONS)]

    def api(self) -> KubeApi:
        """Return an administrator's connection to the API server."""
        hub = Hub(self.paths, self.binaries, self._progress)
        return hub.api(hub.port())

    def node_pid(self, node: str, daemon: str = "kubelet") -> int:
        """Return the process id of a node's ``kubelet``, ``containerd`` or ``proxy``.

        Raises:
            ClusterError: it does not run.
        """
        record = self._node(node).record(daemon)
        if record is None:
            raise ClusterError(f"The {daemon} of {node} does not run.")
        return record.pid

    def container_pids(self, node: str, pod: str, *, container: str | None = None) -> list[tuple[int, str]]:
        """Return (process id on this machine, command line) of every process in a pod's containers.

        The sandbox's own process (pause) is left out.

        Args:
            node: where the pod runs.
            pod: its uid, or ``NAMESPACE/NAME``.
            container: only this container of it; needs ``NAMESPACE/NAME``.
        """
        uid, containers = self._resolve(pod)
        found = cgroups.container_pids(self._node(node).group, uid)
        if container is not None:
            found = {identity: pids for identity, pids in found.items() if containers.get(identity) == container}
        processes = [(pid, command_line(pid)) for pids in found.values() for pid in pids]
        return [(pid, line) for pid, line in processes if line and line != "/pause"]

    def pod_cpu_seconds(self, node: str, pod: str) -> float:
        """Return the CPU time that a pod (uid, or ``NAMESPACE/NAME``) has used on a node, from its cgroup."""
        return cgroups.cpu_seconds(self._node(node).group, self._resolve(pod)[0])

    def run_in(
        self, node: str, argv: Sequence[str], *, seconds: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of this machine in the network of a node (or of the ``hub``).

        Args:
            node: its name.
            argv: the program and its arguments.
            seconds: the deadline.
            check: raise on a non-zero exit.

        Raises:
            ClusterError: it failed.
        """
        words = [*self.network.enter(node), *argv]
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
        if check and done.returncode:
            raise ClusterError(f"`{' '.join(argv)}` in {node} failed ({done.returncode}): {done.stderr.strip()[-800:]}")
        return done

    def kubectl(self, *words: str, seconds: float = 60.0, stdin: str | None = None) -> str:
        """Run kubectl as administrator and return its standard output.

        Raises:
            ClusterError: it failed, with its standard error.
        """
        argv = [str(self.binaries / "kubectl"), f"--kubeconfig={self.kubeconfig}"]
        argv += [f"--cache-dir={self.paths.root / 'kubectl-cache'}", *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, input=stdin, check=False)
        if done.returncode:
            raise ClusterError(f"`kubectl {' '.join(words)}` failed: {done.stderr.strip()[-1500:]}")
        return done.stdout

    @contextlib.contextmanager
    def forward(self, host: str, port: int, *, node: str | None = None) -> Iterator[tuple[str, int]]:
        """Open a way from loopback to an address inside the cluster: a ClusterIP, a pod, a node.

        Args:
            host: the address (no name: names are known to pods only).
            port: the port there.
            node: the node whose network it goes through; the first running one when None.

        Yields:
            (``127.0.0.1``, port).
        """
        through = node or next((n.name for n in self.nodes() if not n.stopped), None)
        if through is None:
            raise ClusterError("No node runs, so no Service can be reached; start one with `start-node NODE`.")
        with tempfile.TemporaryDirectory(prefix="mlxop-forward-") as folder:
            port_file, log = Path(folder) / "port", Path(folder) / "log"
            argv = forward_command(self.network.path(through), 0, f"{host}:{port}", port_file)
            group = self._node(through).group.tracker
            record = spawn(argv, record=Path(folder) / "record", log=log, cgroup=group)
            try:
                wait_until(port_file.exists, what="the forwarder listens", seconds=20, log=log)
                yield "127.0.0.1", int(port_file.read_text())
            finally:
                record.stop(grace=0)

    def user_kubeconfig(self, target: Path, user: str, groups: Sequence[str] = ()) -> Path:
        """Write a kubeconfig for any user (known by client certificate), and return its path."""
        hub = Hub(self.paths, self.binaries, self._progress)
        return Pki(self.paths.pki).write_kubeconfig(
            target, server=f"https://127.0.0.1:{hub.port()}", user=user, groups=groups
        )

    # Inside -------------------------------------------------------------------------------------------------------

    def _hub_runs(self) -> bool:
        return self.running("front")

    def _node(self, name: str) -> Node:
        node_index(name)
        if not self.paths.node(name).is_dir():
            there = ", ".join(node.name for node in self.nodes()) or "none"
            raise ClusterError(f"Cluster {self.name!r} has no node {name!r}; its nodes: {there}.")
        return Node(name, self.paths, self.binaries)

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

    def _wait_ready(self, api: KubeApi, node: Node) -> None:
        component = node.component("kubelet")

        def ready() -> bool:
            if not self.running(component):
                raise ended(component, self.paths.log(component))
            return conditions(api.get(f"/api/v1/nodes/{node.name}")).get("Ready") == "True"

        wait_until(
            ready,
            what=f"node {node.name} is Ready",
            seconds=_NODE_READY_SECONDS,
            log=self.paths.log(component),
            progress=self._progress,
        )

    def _resolve(self, pod: str) -> tuple[str, dict[str, str]]:
        """Return (uid, {container id: name}) of a pod given by uid or by NAMESPACE/NAME."""
        if "/" not in pod:
            return pod, {}
        namespace, _, name = pod.partition("/")
        found = self.api().get(f"/api/v1/namespaces/{namespace}/pods/{name}")
        if found is None:
            raise ClusterError(f"There is no pod {pod}.")
        status = found.get("status", {})
        statuses = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
        names = {s.get("containerID", "").rpartition("/")[2]: s["name"] for s in statuses}
        return found["metadata"]["uid"], names

    def _records(self) -> list[Record]:
        folder = self.paths.records
        found = [Record.read(file) for file in folder.iterdir()] if folder.is_dir() else []
        return [record for record in found if record is not None]

    def _unmount(self) -> None:
        """Nodes mount in a namespace of their own, so there is nothing here, unless somebody shared it by hand."""
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            where = Path(line.split()[4].replace("\\040", " "))
            if where.is_relative_to(self.paths.root):
                subprocess.run(["umount", "--lazy", str(where)], check=True, timeout=20)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time; the kernel drops the lock of a process that dies."""
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


_COREDNS = "/apis/apps/v1/namespaces/kube-system/deployments/coredns"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
