"""Command lines of the programs that make up a cluster; one place says each flag and why."""

from dataclasses import dataclass
from pathlib import Path

from tests.cluster.network import POD_RANGE, SERVICE_API, SERVICE_RANGE
from tests.cluster.pki import Pki

# The upstream default is 50 s; tests of a lost node should not wait that long.
NODE_GRACE_SECONDS = 16
_LARGEST_AUDIT_LOG_MB = 4096


@dataclass(frozen=True)
class ControlPlane:
    """What the programs of one control plane share.

    Attributes:
        binaries: folder of the programs.
        pki: certificates.
        data: etcd's folder.
        etcd_port: etcd's client port on loopback; the next one is its peer port.
        port: the API server's port.
        address: what the API server advertises to the cluster.
        audit_policy: policy file.
        audit_log: log file.
        has_nodes: False when nothing but the API is there.
    """

    binaries: Path
    pki: Pki
    data: Path
    etcd_port: int
    port: int
    address: str
    audit_policy: Path
    audit_log: Path
    has_nodes: bool

    def etcd(self) -> list[str]:
        """Return etcd's command line; nothing outlives the cluster, so it need not wait for the disk."""
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{self.etcd_port + 1}"
        return [
            str(self.binaries / "etcd"),
            f"--data-dir={self.data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def apiserver(self) -> list[str]:
        """Return the API server's command line."""
        names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
        certificate, key = self.pki.issue(
            "apiserver", user="kube-apiserver", hosts=[*names, "127.0.0.1", SERVICE_API, self.address]
        )
        client, client_key = self.pki.issue("kubelet-client", user="kube-apiserver", groups=["system:masters"])
        argv = [
            str(self.binaries / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            f"--secure-port={self.port}",
            f"--bind-address={'0.0.0.0' if self.has_nodes else '127.0.0.1'}",
            f"--advertise-address={self.address}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={self.pki.ca}",
            f"--cert-dir={self.pki.folder}",
            f"--service-cluster-ip-range={SERVICE_RANGE}",
            f"--authorization-mode={'Node,RBAC' if self.has_nodes else 'RBAC'}",
            f"--service-account-key-file={self.pki.service_account_public_key}",
            f"--service-account-signing-key-file={self.pki.service_account_key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--audit-policy-file={self.audit_policy}",
            f"--audit-log-path={self.audit_log}",
            # Blocking: an event is in the file before the client has its answer, so that tests can count right away.
            "--audit-log-mode=blocking",
            f"--audit-log-maxsize={_LARGEST_AUDIT_LOG_MB}",
            "--allow-privileged=true",
        ]
        if not self.has_nodes:
            # Endpoints of the `kubernetes` Service may not be on loopback, and nobody here would use them.
            argv.append("--endpoint-reconciler-type=none")
        if self.has_nodes:
            argv += [
                "--enable-admission-plugins=NodeRestriction",
                # No kube-proxy runs beside it: aggregated APIs and webhooks go to pod addresses.
                "--enable-aggregator-routing=true",
                "--kubelet-preferred-address-types=InternalIP",
                f"--kubelet-client-certificate={client}",
                f"--kubelet-client-key={client_key}",
            ]
        return argv

    def controller_manager(self, kubeconfig: Path, *, controllers: str = "*", port: int = 10257) -> list[str]:
        """Return the controller manager's command line.

        Args:
            kubeconfig: its credentials.
            controllers: comma-separated names; ``*`` for the usual ones.
            port: its own HTTPS port on loopback; 0 for none.
        """
        return [
            str(self.binaries / "kube-controller-manager"),
            f"--kubeconfig={kubeconfig}",
            f"--controllers={controllers}",
            f"--service-account-private-key-file={self.pki.service_account_key}",
            f"--root-ca-file={self.pki.ca}",
            f"--cluster-signing-cert-file={self.pki.ca}",
            f"--cluster-signing-key-file={self.pki.ca_key}",
            f"--cert-dir={self.pki.folder}",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            # The usual 20 requests a second would spend 5 s on one token per controller before any of them starts.
            "--kube-api-qps=300",
            "--kube-api-burst=600",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
            "--node-monitor-period=2s",
            # It makes this folder when it is not there; the usual one is below /usr.
            f"--flex-volume-plugin-dir={self.data.parent / 'volumeplugins'}",
        ]

    def scheduler(self, kubeconfig: Path) -> list[str]:
        """Return the scheduler's command line."""
        return [
            str(self.binaries / "kube-scheduler"),
            f"--kubeconfig={kubeconfig}",
            f"--cert-dir={self.pki.folder}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        ]


def kubelet(binaries: Path, *, name: str, address: str, config: Path, kubeconfig: Path) -> list[str]:
    """Return a kubelet's command line."""
    return [
        str(binaries / "kubelet"),
        f"--kubeconfig={kubeconfig}",
        f"--config={config}",
        f"--hostname-override={name}",
        f"--node-ip={address}",
        "-v=2",
    ]


def proxy(binaries: Path, *, name: str, kubeconfig: Path) -> list[str]:
    """Return a kube-proxy's command line: nftables, and no kernel parameter that is shared with the host."""
    return [
        str(binaries / "kube-proxy"),
        f"--kubeconfig={kubeconfig}",
        "--proxy-mode=nftables",
        f"--cluster-cidr={POD_RANGE}",
        f"--hostname-override={name}",
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0",
        "--oom-score-adj=0",
        "--metrics-bind-address=127.0.0.1:10249",
    ]
