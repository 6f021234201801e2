"""One node: containerd, kubelet and kube-proxy in a network and a mount namespace of their own."""

import shutil
import sys
from pathlib import Path

from tests.cluster import components, configs
from tests.cluster.cgroups import Group
from tests.cluster.errors import ClusterError
from tests.cluster.network import HUB_ADDRESS, Network, node_address, node_index, run_command
from tests.cluster.paths import ClusterPaths
from tests.cluster.pki import Pki
from tests.cluster.prerequisites import find_program
from tests.cluster.processes import Record, environment, spawn
from tests.cluster.waiting import ended, wait_until

API_PORT = 6443
DAEMONS = ("containerd", "kubelet", "proxy")
_OVERLAY_MAGIC = "overlayfs"
# Private first, shared again afterwards: what the node mounts never reaches the host, and pods still see it. /run, a
# memory disk as on any machine, /var/log and /var/lib are the node's own: kubelet, CNI and containerd have fixed places
# there that two nodes would fight over, and that would stay behind on the host. No way leads to the host's nameserver
# from a node: its own are refused at once instead of after a time-out. (Where /etc/resolv.conf was a link into /run,
# nothing is left of it, and Go asks 127.0.0.1 as well.)
_MOUNTS = """
set -e; folder=$1; shift
mount --make-rshared /
mount -t tmpfs -o mode=755,size=512m mlxop-run /run; mkdir -p /run/netns /run/lock
mount --bind "$folder/log" /var/log
mount --bind "$folder/lib" /var/lib
if [ -e /etc/resolv.conf ]; then mount --bind "$folder/resolv.conf" /etc/resolv.conf; fi
for file in $(cd "$folder/sys" && find . -type f); do mount --bind "$folder/sys/$file" "/proc/sys/$file"; done
exec "$@"
"""


class Node:
    """A node of a cluster.

    Args:
        name: ``n1``, ``n2``, ...
        paths: the cluster's files.
        binaries: folder of the programs.
    """

    def __init__(self, name: str, paths: ClusterPaths, binaries: Path) -> None:
        self.name = name
        self.index = node_index(name)
        self.group = Group(f"mlxop-{paths.name}/{name}")
        self.folder = paths.node(name)
        self._paths = paths
        self._binaries = binaries
        self._network = Network(paths.networks)

    @property
    def stopped(self) -> bool:
        """Whether somebody switched this node off."""
        return self._stopped_mark.exists()

    @property
    def _stopped_mark(self) -> Path:
        return self.folder / "stopped"

    def component(self, daemon: str) -> str:
        """Return the name of a daemon's log and record, such as ``kubelet-n1``."""
        return f"{daemon}-{self.name}"

    def record(self, daemon: str) -> Record | None:
        """Return the record of a daemon that runs, or None."""
        record = Record.read(self._paths.record(self.component(daemon)))
        return record if record is not None and record.alive() else None

    def start_runtime(self) -> None:
        """Start containerd and see that the cable is plugged in; a node whose containerd died is switched off and on.

        Containers can only be served by the mount namespace they were started in, and that was containerd's.
        """
        if self.record("containerd"):
            self._network.link(self.name, up=True)
            return
        self.power_off(mark=False)
        self._network.ensure_node(self.index, self._peers())
        self._prepare()
        # The last words become containerd: its process id is the one to enter the node's mounts through.
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNTS, "mounts", str(self.folder)]
        self._spawn("containerd", [*self._network.enter(self.name), *unshare, *self._containerd()])
        self._stopped_mark.unlink(missing_ok=True)

    def wait_for_runtime(self) -> None:
        """Wait until containerd answers."""
        wait_until(
            self._runtime_answers,
            what=f"containerd of {self.name} answers",
            seconds=60,
            log=self._paths.log(self.component("containerd")),
        )

    def start_agents(self, pki: Pki) -> None:
        """Start the kubelet and kube-proxy, unless they run; containerd must run."""
        user = f"system:node:{self.name}"
        if not self.record("kubelet"):
            kubeconfig = pki.write_kubeconfig(
                self.folder / "kubelet.kubeconfig", server=_server(), user=user, groups=["system:nodes"]
            )
            argv = components.kubelet(
                self._binaries,
                name=self.name,
                address=node_address(self.index),
                config=self._kubelet_config(pki),
                kubeconfig=kubeconfig,
            )
            self._spawn("kubelet", [*self._enter(), *argv])
        if not self.record("proxy"):
            kubeconfig = pki.write_kubeconfig(
                self.folder / "proxy.kubeconfig", server=_server(), user="system:kube-proxy"
            )
            self._spawn(
                "proxy", [*self._enter(), *components.proxy(self._binaries, name=self.name, kubeconfig=kubeconfig)]
            )

    def power_off(self, *, mark: bool = True) -> None:
        """Take the node away at once: no goodbye to anybody, nothing of it runs afterwards, its disk stays.

        Args:
            mark: remember that this was asked for, so that `status` says so.
        """
        if mark:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stopped_mark.touch()
        # The cable first: the kernel would close the dead programs' connections politely.
        self._network.unplug_for_good(self.name)
        self.group.kill()
        for daemon in DAEMONS:
            self._paths.record(self.component(daemon)).unlink(missing_ok=True)
        self.group.remove(keep_top=True)
        self._network.remove(self.name)

    def ctr(self, *words: str) -> list[str]:
        """Return the command line of containerd's client, in the namespace of Kubernetes' images."""
        return [str(self._binaries / "ctr"), "--address", str(configs.socket(self.folder)), "-n", "k8s.io", *words]

    @property
    def snapshotter(self) -> str:
        """How containerd stacks layers; an overlay cannot lie on an overlay."""
        kind = run_command(["stat", "-f", "-c", "%T", self._paths.root]).strip()
        return "native" if kind == _OVERLAY_MAGIC else "overlayfs"

    def _peers(self) -> list[int]:
        return [node_index(member) for member in self._network.members() if member != "hub"]

    def _prepare(self) -> None:
        # Leases of pod addresses belong to pods that ended with the power.
        shutil.rmtree(self.folder / "addresses", ignore_errors=True)
        for name in ("cni", "log", "lib"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "resolv.conf").write_text(configs.NO_NAMESERVER)
        for name, value in configs.PRIVATE_SYSCTLS.items():
            file = self.folder / "sys" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
        configs.socket(self.folder).unlink(missing_ok=True)
        configs.write_json(self.folder / "cni" / "10-mlxop.conflist", configs.cni(self.folder, self.index))
        self.group.ensure()
        self._system.ensure()

    @property
    def _system(self) -> Group:
        return Group(f"{self.group.name}/system")

    def _containerd(self) -> list[str]:
        runc = find_program("runc")
        if runc is None:
            raise ClusterError("Missing from PATH: runc; install with `apt-get install runc`.")
        config = self.folder / "containerd.toml"
        config.write_text(
            configs.containerd(self.folder, cni=self._binaries / "cni", runc=runc, snapshotter=self.snapshotter)
        )
        return [str(self._binaries / "containerd"), "--config", str(config)]

    def _kubelet_config(self, pki: Pki) -> Path:
        config = configs.kubelet(
            self.folder, ca=pki.ca, resolv_conf=self._paths.root / "resolv.conf", cgroup=f"/{self.group.name}"
        )
        return configs.write_json(self.folder / "kubelet.json", config)

    def _enter(self) -> list[str]:
        """Return the words that run a command in the node's network and mounts."""
        runtime = self.record("containerd")
        if runtime is None:
            raise ClusterError(f"containerd of {self.name} does not run; start the node with `start-node {self.name}`.")
        return [*self._network.enter(self.name), f"--mount=/proc/{runtime.pid}/ns/mnt"]

    def _runtime_answers(self) -> bool:
        if not self.record("containerd"):
            component = self.component("containerd")
            raise ended(component, self._paths.log(component))
        try:
            run_command(self.ctr("version"))
        except ClusterError:
            return False
        return True

    def _spawn(self, daemon: str, argv: list[str]) -> None:
        path = f"{self._binaries}:{environment()['PATH']}"
        component = self.component(daemon)
        spawn(
            argv,
            record=self._paths.record(component),
            log=self._paths.log(component),
            cgroup=self._system.tracker,
            env={"PATH": path, "HOME": "/root", "LANG": "C.UTF-8"},
        )


def forward_command(network: Path, port: str, target: str, port_file: Path) -> list[str]:
    """Return the command line of the forwarder from loopback into a namespace (see ``front.py``)."""
    return [
        sys.executable,
        "-I",
        str(Path(__file__).with_name("front.py")),
        str(network),
        port,
        target,
        str(port_file),
    ]


def _server() -> str:
    return f"https://{HUB_ADDRESS}:{API_PORT}"
