"""What this machine must have, checked before anything is started: one sentence per missing thing, with the remedy."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.cluster import cgroups
from tests.cluster.errors import ClusterError
from tests.cluster.processes import environment

# Images unpacked on two nodes, logs, etcd.
DISK_NEEDED_BYTES = 4 << 30
# Programs that come from the distribution, with the Debian package of each.
_PROGRAMS = {
    "ip": "iproute2",
    "nft": "nftables",
    "iptables": "iptables",
    "runc": "runc",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}
# Below the kernel's range for outgoing connections, so that a stopped server's port is not taken by a client.
PORTS = range(20000, 32000)
_CAPABILITIES = {12: "CAP_NET_ADMIN", 21: "CAP_SYS_ADMIN"}
_BRIDGE_FILTER = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
# These are replaced by private ones inside a node.
_HIDDEN_IN_NODES = (Path("/run"), Path("/var/run"), Path("/var/log"), Path("/var/lib"))


def find_program(name: str) -> str | None:
    """Return the path of a program; the system's folders count even when PATH lacks them (as for a plain `su`)."""
    return shutil.which(name, path=environment()["PATH"])


def check_cluster(root: Path, *, port: int = 0) -> None:
    """Check everything that a cluster of nodes needs.

    Args:
        root: the cluster's folder, which may not exist yet.
        port: the loopback port that the user asked for; 0 for any.

    Raises:
        ClusterError: one sentence per missing thing.
    """
    missing = missing_root()
    missing += missing_programs()
    if not missing:
        missing += missing_kernel()
    missing += missing_space(root) + misplaced(root) + taken_port(port)
    if missing:
        raise ClusterError("\n".join(missing))


def missing_root() -> list[str]:
    """Network and mount namespaces need root with two capabilities."""
    if os.geteuid() != 0:
        return ["The cluster's nodes need root: run this again with sudo (the API-server-only mode needs none)."]
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    bits = int(effective.split()[1], 16)
    lacking = [name for bit, name in _CAPABILITIES.items() if not bits >> bit & 1]
    if not lacking:
        return []
    return [f"This root lacks {' and '.join(lacking)}: run on a machine or in a container that grants them."]


def missing_programs() -> list[str]:
    """Programs of the distribution that the nodes use."""
    lacking = sorted(name for name in _PROGRAMS if find_program(name) is None)
    if not lacking:
        return []
    packages = " ".join(sorted({_PROGRAMS[name] for name in lacking}))
    return [f"Missing from PATH: {', '.join(lacking)}; install with `apt-get install {packages}`."]


def missing_kernel() -> list[str]:
    """Kernel features that a kubelet and a kube-proxy need."""
    missing = []
    if lacking := cgroups.missing_controllers():
        missing.append(
            f"The cgroup controllers {', '.join(lacking)} are not mounted below {cgroups.ROOT}: mount them, "
            "or boot with cgroup v1 or v2 in the usual way."
        )
    if not _BRIDGE_FILTER.exists():
        missing.append(f"{_BRIDGE_FILTER} is missing: load the kernel module with `modprobe br_netfilter`.")
    tried = subprocess.run(
        [find_program("nft") or "nft", "list", "tables"], capture_output=True, text=True, timeout=20, check=False
    )
    if tried.returncode:
        missing.append(f"The kernel has no nftables ({tried.stderr.strip()}): load it with `modprobe nf_tables`.")
    return missing


def missing_space(root: Path) -> list[str]:
    """Room on the disk of the cluster's folder."""
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free >= DISK_NEEDED_BYTES:
        return []
    return [
        f"{existing} has {free / 2**30:.1f} GiB free and a cluster needs {DISK_NEEDED_BYTES / 2**30:.0f} GiB: "
        "free some space, or set MLX_OPERATOR_CACHE to a folder on a larger disk."
    ]


def misplaced(root: Path) -> list[str]:
    """A place that the nodes could not see, or whose socket names would be too long."""
    for hidden in _HIDDEN_IN_NODES:
        if root.is_relative_to(hidden):
            return [
                f"{root} is below {hidden}, which is private in each node: set MLX_OPERATOR_CACHE to another folder."
            ]
    if len(str(root)) > 70:
        return [
            f"{root} is too long for the Unix sockets below it (70 characters at most): "
            "set MLX_OPERATOR_CACHE to a shorter path."
        ]
    return []


def taken_port(port: int) -> list[str]:
    """A loopback port that somebody else listens on."""
    if not port or port_is_free(port):
        return []
    return [f"Port {port} of 127.0.0.1 is in use: choose another with --port, or leave --port out to get a free one."]


def port_is_free(port: int) -> bool:
    """Whether a loopback port can be listened on right now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
