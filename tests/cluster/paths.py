"""Where the local cluster keeps its files: outside the checkout, one folder per cluster, so that names never clash."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError

DEFAULT_NAME = "default"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?")


def cache_root() -> Path:
    """Return the cache folder: ``MLX_OPERATOR_CACHE``, else ``mlx-operator`` in XDG_CACHE_HOME or ``~/.cache``."""
    named = os.environ.get("MLX_OPERATOR_CACHE")
    if named:
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mlx-operator"


def check_name(name: str) -> str:
    """Return ``name`` when it can be part of namespace, cgroup and file names.

    Raises:
        ClusterError: the name has other characters than a-z, 0-9 and '-', or more than 20 of them.
    """
    if not _NAME.fullmatch(name):
        raise ClusterError(
            f"--name {name!r}: a cluster name is 1 to 20 characters of a-z, 0-9 and '-', such as {DEFAULT_NAME!r}."
        )
    return name


@dataclass(frozen=True)
class ClusterPaths:
    """The files of one cluster, all below ``root``."""

    name: str

    def __post_init__(self) -> None:
        """Refuse a name that could not be a file or cgroup name."""
        check_name(self.name)

    @property
    def root(self) -> Path:
        """Folder of the cluster; its existence means that something may have been started."""
        return cache_root() / "cluster" / self.name

    @property
    def lock(self) -> Path:
        """Lock file, beside the folder so that `down` can remove the folder while it holds the lock."""
        return cache_root() / "cluster" / f"{self.name}.lock"

    @property
    def pki(self) -> Path:
        """Certificates and keys."""
        return self.root / "pki"

    @property
    def logs(self) -> Path:
        """One log file per component."""
        return self.root / "logs"

    @property
    def records(self) -> Path:
        """One process record per component (see ``tests.cluster.processes``)."""
        return self.root / "records"

    @property
    def state(self) -> Path:
        """JSON: number of nodes, port of the API server on loopback."""
        return self.root / "state.json"

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig for programs on this machine."""
        return self.root / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        """API server's audit log, one JSON event a line."""
        return self.root / "audit.log"

    @property
    def networks(self) -> Path:
        """One file per network namespace."""
        return self.root / "netns"

    def node(self, node: str) -> Path:
        """Folder of one node."""
        return self.root / "nodes" / node

    def log(self, component: str) -> Path:
        """Log file of a component such as ``etcd`` or ``kubelet-n1``."""
        return self.logs / f"{component}.log"

    def record(self, component: str) -> Path:
        """Process record of a component."""
        return self.records / component
