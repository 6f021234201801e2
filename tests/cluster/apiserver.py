"""Only etcd and an API server, on loopback: real admission, CEL, watches and garbage collection without a node.

No namespaces and no root. Several run at once, each with ports and a folder of its own. The API server can be stopped
and started again on the same port and data, for tests of its loss.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.cluster import binaries as programs
from tests.cluster import configs, prerequisites
from tests.cluster.components import ControlPlane
from tests.cluster.errors import ClusterError
from tests.cluster.kubeapi import KubeApi
from tests.cluster.paths import cache_root, check_name
from tests.cluster.pki import Pki
from tests.cluster.processes import Record, spawn
from tests.cluster.waiting import Progress, ended, silent, tail, tell, wait_until

# What an operator leans on: garbage collection, deletion of namespaces, service accounts, aggregated roles.
CONTROLLERS = (
    "garbage-collector-controller,namespace-controller,serviceaccount-controller,"
    "serviceaccount-token-controller,clusterrole-aggregation-controller"
)
_PROGRAMS = frozenset({"etcd", "kube-apiserver", "kube-controller-manager", "kubectl"})
_COMPONENTS = ("controller-manager", "apiserver", "etcd")
_ATTEMPTS = 4
_READY_SECONDS = 90.0


class ApiServer:
    """An API server for tests; a context manager.

    Args:
        folder: where its files go; a temporary one, removed at the end, when None.
        controllers: also run the controllers named in `CONTROLLERS`.
        progress: receives a line when something takes long.
        binaries: folder of the programs; built or taken from the cache when None.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        controllers: bool = True,
        progress: Progress = silent,
        binaries: Path | None = None,
    ) -> None:
        self._folder = folder
        self._temporary = folder is None
        self._controllers = controllers
        self._progress = progress
        self._binaries = binaries
        self._port = 0

    @property
    def folder(self) -> Path:
        """Folder of certificates, logs and data.

        Raises:
            ClusterError: it was not started yet.
        """
        if self._folder is None:
            raise ClusterError("The API server was not started: use it as a context manager, or call start().")
        return self._folder

    @property
    def binaries(self) -> Path:
        """Folder of kubectl and of the server's own programs."""
        if self._binaries is None:
            self._binaries = programs.ensure(self._progress, only=_PROGRAMS)
        return self._binaries

    @property
    def port(self) -> int:
        """The API server's port on 127.0.0.1; the same for the whole life of the folder."""
        if not self._port:
            self._port = int((self.folder / "port").read_text())
        return self._port

    @property
    def url(self) -> str:
        """The API server's address."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig."""
        return self.folder / "kubeconfig"

    @property
    def audit_log(self) -> Path:
        """The audit log: Metadata level, a JSON event per line; see ``tests.cluster.audit``."""
        return self.folder / "audit.log"

    @property
    def pki(self) -> Pki:
        """The server's certificates."""
        return Pki(self.folder / "pki")

    def start(self) -> None:
        """Start everything that does not run yet, and wait until the API server is ready.

        Raises:
            ClusterError: it did not get ready; the message ends with its log.
        """
        binaries = self.binaries
        if self._folder is None:
            _sweep()
            root = cache_root() / "apiserver"
            root.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=root))
            owner = Record.of(os.getpid())
            if owner is not None:
                owner.write(self._folder / "owner")
        self.folder.mkdir(parents=True, exist_ok=True)
        if missing := prerequisites.missing_space(self.folder):
            raise ClusterError(missing[0])
        self.pki.ensure()
        configs.write_json(self.folder / "audit-policy.json", configs.audit_policy())
        self._start_servers(binaries)
        if self._controllers:
            self._start_controllers()

    def stop(self) -> None:
        """Stop everything and remove the folder."""
        if self._folder is None:
            return
        for component in _COMPONENTS:
            self._stop(component, grace=0)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._port = 0
        if self._temporary:
            self._folder = None

    def stop_apiserver(self, *, grace: float = 0.0) -> None:
        """Stop only the API server: connections break, data stays.

        Args:
            grace: seconds for a polite end; 0 is a crash.
        """
        self._stop("apiserver", grace=grace)

    def start_apiserver(self) -> None:
        """Start the API server again, on the same port and data, and wait until it is ready."""
        self._ensure("apiserver", self._programs(self.binaries).apiserver())
        self._wait_ready()

    def restart_controllers(self) -> None:
        """Start the controllers anew: after a long outage they look again only when their back-off is over."""
        self._stop("controller-manager", grace=0)
        self._start_controllers()

    def api(self) -> KubeApi:
        """Return an administrator's connection."""
        certificate, key = self.pki.issue("admin", user="kubernetes-admin", groups=["system:masters"])
        return KubeApi(self.port, ca=self.pki.ca, certificate=certificate, key=key)

    def user_kubeconfig(self, target: Path, user: str, groups: Sequence[str] = ()) -> Path:
        """Write a kubeconfig for any user (known by client certificate), and return its path."""
        return self.pki.write_kubeconfig(target, server=self.url, user=user, groups=groups)

    def running(self, component: str) -> bool:
        """Whether ``etcd``, ``apiserver`` or ``controller-manager`` runs."""
        record = Record.read(self._record(component))
        return record is not None and record.alive()

    def log(self, component: str) -> Path:
        """Log file of ``etcd``, ``apiserver`` or ``controller-manager``."""
        return self.folder / "logs" / f"{component}.log"

    def __enter__(self) -> "ApiServer":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _programs(self, binaries: Path) -> ControlPlane:
        return ControlPlane(
            binaries=binaries,
            pki=self.pki,
            data=self.folder / "etcd",
            etcd_port=int((self.folder / "etcd-port").read_text()),
            port=self.port,
            address="127.0.0.1",
            audit_policy=self.folder / "audit-policy.json",
            audit_log=self.audit_log,
            has_nodes=False,
        )

    def _start_controllers(self) -> None:
        kubeconfig = self.user_kubeconfig(
            self.folder / "controller-manager.kubeconfig", "system:kube-controller-manager"
        )
        manager = self._programs(self.binaries).controller_manager(kubeconfig, controllers=CONTROLLERS, port=0)
        self._ensure("controller-manager", manager)

    def _start_servers(self, binaries: Path) -> None:
        """Start etcd and the API server; between choosing a port and using it, somebody else may take it."""
        for attempt in range(1, _ATTEMPTS + 1):
            fresh = not (self.folder / "port").exists()
            if fresh:
                self._choose_ports()
            self.user_kubeconfig(self.kubeconfig, "kubernetes-admin", ["system:masters"])
            self._ensure("etcd", self._programs(binaries).etcd())
            self._ensure("apiserver", self._programs(binaries).apiserver())
            try:
                self._wait_ready()
                return
            except ClusterError:
                if not (fresh and attempt < _ATTEMPTS and self._lost_port()):
                    raise
            for component in _COMPONENTS:
                self._stop(component, grace=0)
            (self.folder / "port").unlink()
            self._port = 0

    def _choose_ports(self) -> None:
        etcd, server = _free_pair(), _free_pair()
        while server == etcd:
            server = _free_pair()
        (self.folder / "etcd-port").write_text(str(etcd))
        (self.folder / "port").write_text(str(server))

    def _lost_port(self) -> bool:
        logs = "".join(tail(self.log(component), 40) for component in ("etcd", "apiserver"))
        return "address already in use" in logs

    def _wait_ready(self) -> None:
        api = self.api()

        def ready() -> bool:
            for component in ("etcd", "apiserver"):
                if not self.running(component):
                    raise ended(component, self.log(component))
            return api.ready()

        wait_until(
            ready,
            what="the API server is ready",
            seconds=_READY_SECONDS,
            log=self.log("apiserver"),
            progress=self._progress,
        )

    def _record(self, component: str) -> Path:
        return self.folder / "records" / component

    def _ensure(self, component: str, argv: Sequence[str]) -> None:
        if not self.running(component):
            spawn(argv, record=self._record(component), log=self.log(component))

    def _stop(self, component: str, *, grace: float) -> None:
        record = Record.read(self._record(component))
        if record is not None:
            record.stop(grace=grace)


_TEMPORARY = "tmp-"


def named(name: str) -> ApiServer:
    """Return the API server of the command line, which outlives the process that starts it."""
    return ApiServer(cache_root() / "apiserver" / check_name(name), progress=tell)


def _sweep() -> None:
    """Remove what test processes that were killed have left: temporary servers whose owner is gone."""
    root = cache_root() / "apiserver"
    for folder in root.glob(f"{_TEMPORARY}*"):
        owner = Record.read(folder / "owner")
        if owner is not None and not owner.alive():
            ApiServer(folder).stop()


def _free_pair() -> int:
    """Return a port that is free together with the next one."""
    # Which port it is must differ between runs, not be secret.
    for port in random.sample(prerequisites.PORTS[::2], 200):
        if prerequisites.port_is_free(port) and prerequisites.port_is_free(port + 1):
            return port
    first, last = prerequisites.PORTS[0], prerequisites.PORTS[-1]
    raise ClusterError(f"No free ports between {first} and {last} of 127.0.0.1: end what listens there.")
