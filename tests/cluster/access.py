"""Looking into a cluster that runs, from this machine: kubectl, processes of a pod, networks, Services."""

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster import binaries as programs
from tests.cluster import cgroups
from tests.cluster.errors import ClusterError
from tests.cluster.hub import COMPONENTS, Hub
from tests.cluster.kubeapi import KubeApi
from tests.cluster.network import Network, node_index, run_command
from tests.cluster.node import DAEMONS, Node, forward_command
from tests.cluster.paths import ClusterPaths
from tests.cluster.processes import Record, command_line, environment, spawn
from tests.cluster.waiting import Progress, wait_until

_SANDBOX = "/pause"


class ClusterAccess:
    """Everything about a cluster that changes nothing of it.

    Args:
        name: the cluster's name.
        progress: receives a line now and then.
        binaries: folder of the programs; built or taken from the cache when None.
    """

    def __init__(self, name: str, *, progress: Progress, binaries: Path | None) -> None:
        self.paths = ClusterPaths(name)
        self.network = Network(self.paths.networks)
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

    @property
    def hub(self) -> Hub:
        """The control plane."""
        return Hub(self.paths, self.binaries, self._progress)

    def nodes(self) -> list[Node]:
        """Return the nodes of this cluster, running or not."""
        folder = self.paths.root / "nodes"
        names = sorted((f.name for f in folder.iterdir()), key=node_index) if folder.is_dir() else []
        return [Node(name, self.paths, self.binaries) for name in names]

    def node(self, name: str) -> Node:
        """Return one node.

        Raises:
            ClusterError: there is no node of that name.
        """
        node_index(name)
        if not self.paths.node(name).is_dir():
            there = ", ".join(node.name for node in self.nodes()) or "none"
            raise ClusterError(f"Cluster {self.name!r} has no node {name!r}; its nodes: {there}.")
        return Node(name, self.paths, self.binaries)

    def running(self, component: str) -> bool:
        """Whether a component such as ``etcd`` or ``kubelet-n1`` runs."""
        record = Record.read(self.paths.record(component))
        return record is not None and record.alive()

    def components(self) -> list[str]:
        """Return the names of all components that should run."""
        return [*COMPONENTS, *(node.component(daemon) for node in self.nodes() for daemon in DAEMONS)]

    def api(self) -> KubeApi:
        """Return an administrator's connection to the API server."""
        return self.hub.api(self.hub.port())

    def node_pid(self, node: str, daemon: str = "kubelet") -> int:
        """Return the process id of a node's ``kubelet``, ``containerd`` or ``proxy``.

        Raises:
            ClusterError: it does not run.
        """
        record = self.node(node).record(daemon)
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
        if container is not None and container not in containers.values():
            raise ClusterError(
                f"Pod {pod} has no running container {container!r}; it has {sorted(containers.values())}."
            )
        found = cgroups.container_pids(self.node(node).group, uid)
        if container is not None:
            found = {identity: pids for identity, pids in found.items() if containers.get(identity) == container}
        processes = [(pid, command_line(pid)) for pids in found.values() for pid in pids]
        return [(pid, line) for pid, line in processes if line and line != _SANDBOX]

    def pod_cpu_seconds(self, node: str, pod: str) -> float:
        """Return the CPU time that a pod (uid, or ``NAMESPACE/NAME``) has used on a node, from its cgroup."""
        return cgroups.cpu_seconds(self.node(node).group, self._resolve(pod)[0])

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
            ClusterError: it failed, or took too long.
        """
        words = [*self.network.enter(node), *argv]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"`{' '.join(argv)}` in {node} gave no answer in {seconds:.0f} s.") from error
        if check and done.returncode:
            said = done.stderr.strip()[-800:]
            raise ClusterError(f"`{' '.join(argv)}` in {node} failed ({done.returncode}): {said}")
        return done

    def kubectl(self, *words: str, seconds: float = 60.0, stdin: str = "") -> str:
        """Run kubectl as administrator and return its standard output.

        Raises:
            ClusterError: it failed, with its standard error.
        """
        cache = self.paths.root / "kubectl-cache"
        options = [f"--kubeconfig={self.kubeconfig}", f"--cache-dir={cache}"]
        return run_command([self.binaries / "kubectl", *options, *words], stdin=stdin, seconds=seconds)

    @contextlib.contextmanager
    def forward(self, host: str, port: int, *, node: str | None = None) -> Iterator[tuple[str, int]]:
        """Open a way from loopback to an address inside the cluster: a ClusterIP, a pod, a node.

        Args:
            host: the address (no name: names are known to pods only).
            port: the port there.
            node: the node whose network it goes through, and with which it ends; the first that runs when None.

        Yields:
            (``127.0.0.1``, port).
        """
        through = node or next((n.name for n in self.nodes() if not n.stopped), None)
        if through is None:
            raise ClusterError("No node runs, so no Service can be reached; start one with `start-node NODE`.")
        with tempfile.TemporaryDirectory(prefix="mlxop-forward-") as folder:
            port_file, log = Path(folder) / "port", Path(folder) / "log"
            argv = forward_command(self.network.path(through), "0", f"{host}:{port}", port_file)
            record = spawn(argv, record=Path(folder) / "record", log=log, cgroup=self.node(through).group.tracker)
            try:
                wait_until(port_file.exists, what="the forwarder listens", seconds=20, log=log)
                yield "127.0.0.1", int(port_file.read_text())
            finally:
                record.stop(grace=0)

    def user_kubeconfig(self, target: Path, user: str, groups: Sequence[str] = ()) -> Path:
        """Write a kubeconfig for any user (known by client certificate), and return its path."""
        server = f"https://127.0.0.1:{self.hub.port()}"
        return self.hub.pki.write_kubeconfig(target, server=server, user=user, groups=groups)

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
