"""Network namespaces of a cluster: a hub with a bridge for the control plane, and one namespace per node.

All addresses exist only inside these namespaces (198.51.100.0/24 is a documentation range, RFC 5737), so any number of
clusters can use the same ones. There is no way out of the hub: the cluster reaches nothing but itself. A namespace is
kept by a file in the cluster's folder instead of a name in /run/netns, which would leave a mount there for good.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.processes import environment

HUB = "hub"
HUB_ADDRESS = "198.51.100.1"
POD_RANGE = "10.244.0.0/16"
SERVICE_RANGE = "10.96.0.0/16"
SERVICE_API = "10.96.0.1"
MAX_NODES = 20
_SECONDS = 20.0


def node_name(index: int) -> str:
    """Return the name of the node with this index, counted from 1."""
    return f"n{index}"


def node_index(node: str) -> int:
    """Return the index of a node name.

    Raises:
        ClusterError: it is not the name of a node.
    """
    if not (node.startswith("n") and node[1:].isdecimal() and 1 <= int(node[1:]) <= MAX_NODES):
        raise ClusterError(f"{node!r} is not a node: nodes are called n1 to n{MAX_NODES}.")
    return int(node[1:])


def node_address(index: int) -> str:
    """Return the address of a node."""
    return f"198.51.100.{10 + index}"


def pod_subnet(index: int) -> str:
    """Return the range that a node's pods get their addresses from."""
    return f"10.244.{index}.0/24"


def run_command(argv: Sequence[str | Path], *, stdin: str = "", seconds: float = _SECONDS) -> str:
    """Run a short program and return its standard output.

    Raises:
        ClusterError: it failed or took too long; the message has its standard error.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, timeout=seconds, env=environment(), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"`{' '.join(words)}` gave no answer in {seconds:.0f} s.") from error
    if done.returncode:
        raise ClusterError(
            f"`{' '.join(words)}` failed ({done.returncode}): {done.stderr.strip()[-1500:]} {stdin[:500]}".rstrip()
        )
    return done.stdout


class Network:
    """The namespaces of one cluster.

    Args:
        folder: where the files lie that keep the namespaces.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, member: str) -> Path:
        """Return the namespace file of the hub or of a node."""
        return self._folder / member

    def enter(self, member: str) -> list[str]:
        """Return the words that run a command in a member's network; no mount is touched, as `ip netns exec` would."""
        return ["nsenter", f"--net={self.path(member)}"]

    def members(self) -> list[str]:
        """Return the members that have a namespace."""
        return sorted(file.name for file in self._folder.iterdir()) if self._folder.is_dir() else []

    def ensure_hub(self) -> None:
        """Make the hub with its bridge, unless it is there and whole."""
        if self._answers(HUB, "br0"):
            return
        self.remove(HUB)
        self._create(HUB)
        self._batch(HUB, ["link set lo up", "link add br0 type bridge"])
        self._forwarding(HUB)
        # The address comes up last: it is the sign that the hub is whole.
        self._batch(HUB, ["link set br0 up", f"addr add {HUB_ADDRESS}/24 dev br0"])

    def ensure_node(self, index: int, others: Sequence[int]) -> None:
        """Make a node's namespace, its link to the hub and the routes between it and the other nodes.

        Args:
            index: the node.
            others: indices of the nodes that have, or will have, a namespace of their own.
        """
        node, address = node_name(index), node_address(index)
        if self._answers(node, "eth0"):
            self.link(node, up=True)
            return
        self.unplug_for_good(node)
        self.remove(node)
        self._create(node)
        self._batch(node, ["link set lo up", f"link add eth0 type veth peer name {node} netns {self.path(HUB)}"])
        self._forwarding(node)
        self._batch(
            HUB, [f"link set {node} master br0 up", f"route replace {pod_subnet(index)} via {address} dev br0 onlink"]
        )
        self._batch(
            node,
            [
                "link set eth0 up",
                f"addr add {address}/24 dev eth0",
                f"route add default via {HUB_ADDRESS}",
                *(f"route add {pod_subnet(o)} via {node_address(o)} dev eth0 onlink" for o in others if o != index),
            ],
        )

    def add_route(self, member: str, index: int) -> None:
        """Tell a member where the pods of another node are."""
        self._batch(member, [f"route replace {pod_subnet(index)} via {node_address(index)} dev eth0 onlink"])

    def link(self, node: str, *, up: bool) -> None:
        """Plug or unplug the cable between a node and the hub."""
        self._batch(HUB, [f"link set {node} {'up' if up else 'down'}"])

    def linked(self, node: str) -> bool:
        """Whether the cable between a node and the hub is plugged in."""
        return "UP" in self._cables().get(node, ())

    def unplug_for_good(self, node: str) -> None:
        """Take a node's cable away; the namespace stays until `remove`."""
        # The kernel takes its time to clean up a namespace; its end of the cable must be gone before a new one comes.
        if node in self._cables():
            self._batch(HUB, [f"link del {node}"])

    def remove(self, member: str) -> None:
        """Remove a member's namespace, if it is there."""
        path = self.path(member)
        if not path.exists():
            return
        # A file that nothing is mounted on comes from a crash, or from before a restart of the machine.
        if path.stat().st_dev != self._folder.stat().st_dev:
            run_command(["umount", path])
        path.unlink()

    def _cables(self) -> dict[str, list[str]]:
        """Return {name: flags} of the links in the hub."""
        if HUB not in self.members():
            return {}
        try:
            links = json.loads(run_command([*self.enter(HUB), "ip", "-j", "link", "show"]))
        except ClusterError:
            # The file of a namespace that was never finished, or did not survive a restart of the machine.
            return {}
        return {link["ifname"]: link["flags"] for link in links}

    def _create(self, member: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path(member).touch()
        run_command(["unshare", f"--net={self.path(member)}", "true"])

    def _batch(self, member: str, lines: Sequence[str]) -> None:
        run_command([*self.enter(member), "ip", "-batch", "-"], stdin="\n".join(lines) + "\n")

    def _forwarding(self, member: str) -> None:
        # With bridge-nf-call, traffic between two pods of a node passes the Service rules on its way back too.
        script = "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/bridge/bridge-nf-call-iptables"
        run_command([*self.enter(member), "sh", "-ec", script])

    def _answers(self, member: str, interface: str) -> bool:
        """Whether the namespace is there and its interface has its address (the last step of making it)."""
        try:
            text = run_command([*self.enter(member), "ip", "-j", "-4", "addr", "show", "dev", interface])
        except ClusterError:
            return False
        return any(link.get("addr_info") for link in json.loads(text))
