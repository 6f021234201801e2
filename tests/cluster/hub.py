"""The control plane of a cluster of nodes, in the hub namespace: etcd, API server, controllers, scheduler, front.

The front is the only thing of a cluster that the host's network sees: a port of 127.0.0.1 that leads to the API server.
"""

import json
from pathlib import Path

from tests.cluster import configs
from tests.cluster.cgroups import Group
from tests.cluster.components import ControlPlane
from tests.cluster.errors import ClusterError
from tests.cluster.kubeapi import KubeApi
from tests.cluster.network import HUB, HUB_ADDRESS, Network
from tests.cluster.node import API_PORT, forward_command
from tests.cluster.paths import ClusterPaths
from tests.cluster.pki import Pki
from tests.cluster.prerequisites import PORTS, taken_port
from tests.cluster.processes import Record, spawn
from tests.cluster.waiting import Progress, ended, wait_until

COMPONENTS = ("etcd", "apiserver", "controller-manager", "scheduler", "front")
_ETCD_PORT = 2379
_READY_SECONDS = 90.0


class Hub:
    """The control plane of one cluster.

    Args:
        paths: the cluster's files.
        binaries: folder of the programs.
        progress: told what is waited for.
    """

    def __init__(self, paths: ClusterPaths, binaries: Path, progress: Progress) -> None:
        self.group = Group(f"mlxop-{paths.name}/{HUB}")
        self.pki = Pki(paths.pki)
        self._paths = paths
        self._network = Network(paths.networks)
        self._progress = progress
        self._programs = ControlPlane(
            binaries=binaries,
            pki=self.pki,
            data=paths.root / "etcd",
            etcd_port=_ETCD_PORT,
            port=API_PORT,
            address=HUB_ADDRESS,
            audit_policy=paths.root / "audit-policy.json",
            audit_log=paths.audit_log,
            has_nodes=True,
        )

    def running(self, component: str) -> Record | None:
        """Return the record of a component that runs, or None."""
        record = Record.read(self._paths.record(component))
        return record if record is not None and record.alive() else None

    def start(self) -> None:
        """Start etcd and the API server, unless they run; `wait` says when they answer."""
        self.pki.ensure()
        self._network.ensure_hub()
        self.group.ensure()
        configs.write_json(self._paths.root / "audit-policy.json", configs.audit_policy())
        self._ensure("etcd", self._programs.etcd())
        self._ensure("apiserver", self._programs.apiserver())

    def start_front(self, port: int) -> int:
        """Start the way from loopback to the API server, unless it runs, and return its port.

        Args:
            port: 0 for any free one; kept from then on, so that kubeconfigs stay right over a repair.
        """
        wanted = port or self._recorded_port()
        port_file = self._paths.root / "front.port"
        if self.running("front"):
            if port and port != self._recorded_port():
                raise ClusterError(
                    f"Cluster {self._paths.name!r} listens on port {self._recorded_port()}, not on --port {port}: "
                    "run `down` first, or leave --port out."
                )
        else:
            if taken := taken_port(wanted):
                if port:
                    raise ClusterError(taken[0])
                wanted = 0
            port_file.unlink(missing_ok=True)
            ports = str(wanted or f"{PORTS[0]}-{PORTS[-1]}")
            argv = forward_command(self._network.path(HUB), ports, f"{HUB_ADDRESS}:{API_PORT}", port_file)
            # It starts in the host's network and moves over by itself.
            spawn(
                argv,
                record=self._paths.record("front"),
                log=self._paths.log("front"),
                cgroup=self.group.tracker,
            )
        wait_until(port_file.exists, what="the front listens", seconds=20, log=self._paths.log("front"))
        taken_now = int(port_file.read_text())
        self.pki.write_kubeconfig(
            self._paths.kubeconfig,
            server=f"https://127.0.0.1:{taken_now}",
            user="kubernetes-admin",
            groups=["system:masters"],
        )
        return taken_now

    def wait(self, port: int) -> None:
        """Wait until the API server is ready, then start what needs it.

        Args:
            port: the front's port.
        """
        api = self.api(port)

        def ready() -> bool:
            for component in ("etcd", "apiserver", "front"):
                if not self.running(component):
                    raise ended(component, self._paths.log(component))
            return api.ready()

        log = self._paths.log("apiserver")
        wait_until(ready, what="the API server is ready", seconds=_READY_SECONDS, log=log, progress=self._progress)
        server = f"https://{HUB_ADDRESS}:{API_PORT}"
        for component in ("controller-manager", "scheduler"):
            kubeconfig = self.pki.write_kubeconfig(
                self._paths.root / f"{component}.kubeconfig", server=server, user=f"system:kube-{component}"
            )
            programs = self._programs
            argv = (
                programs.scheduler(kubeconfig) if component == "scheduler" else programs.controller_manager(kubeconfig)
            )
            self._ensure(component, argv)

    def api(self, port: int) -> KubeApi:
        """Return an administrator's connection through the front."""
        certificate, key = self.pki.issue("admin", user="kubernetes-admin", groups=["system:masters"])
        return KubeApi(port, ca=self.pki.ca, certificate=certificate, key=key)

    def port(self) -> int:
        """Return the port that the front listens on.

        Raises:
            ClusterError: there is none.
        """
        if not self.running("front"):
            raise ClusterError(
                f"Cluster {self._paths.name!r} does not run: start it with `python -m tests.cluster up`."
            )
        return self._recorded_port()

    def _recorded_port(self) -> int:
        """The port of last time: from the kubeconfig, which others may have kept."""
        try:
            config = json.loads(self._paths.kubeconfig.read_text())
        except FileNotFoundError:
            return 0
        return int(config["clusters"][0]["cluster"]["server"].rpartition(":")[2])

    def _ensure(self, component: str, argv: list[str]) -> None:
        if not self.running(component):
            spawn(
                [*self._network.enter(HUB), *argv],
                record=self._paths.record(component),
                log=self._paths.log(component),
                cgroup=self.group.tracker,
            )
