"""Configuration files of the cluster's programs, rendered from a few values."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.manifests import DNS_ADDRESS
from tests.cluster.network import pod_subnet

PAUSE_IMAGE = "localhost/pause:1"
# The host's values of these three are shared by all namespaces; a kubelet sets them, so it gets plain files instead.
PRIVATE_SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
# Nobody listens there: what programs of the node itself ask for does not exist. Pods are given CoreDNS.
NO_NAMESERVER = "nameserver 127.0.0.1\n"

_CONTAINERD = """\
version = 3
root = {root}
state = "/run/containerd"
# No CAP_SYS_RESOURCE, no lower scores: both this and restrict_oom_score_adj are for machines that lack it.
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.erofs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
  "io.containerd.nri.v1.nri",
]
[grpc]
  address = {socket}
[ttrpc]
  address = {ttrpc}
[plugins."io.containerd.internal.v1.opt"]
  path = {opt}
[plugins."io.containerd.cri.v1.images"]
  snapshotter = {snapshotter}
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = {pause}
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [{cni}]
    conf_dir = {cni_conf}
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = {runc}
        SystemdCgroup = false
"""


def containerd(node: Path, *, cni: Path, runc: str, snapshotter: str) -> str:
    """Return containerd's configuration.

    Its state is below /run, which is private to the node and vanishes with it, as on a machine that loses power.

    Args:
        node: the node's folder.
        cni: folder of the CNI plugins.
        runc: path of runc.
        snapshotter: ``overlayfs``, or ``native`` where the disk below is an overlay itself.
    """
    values = {
        "root": node / "containerd",
        "socket": socket(node),
        "ttrpc": f"{socket(node)}.ttrpc",
        "opt": node / "opt",
        "snapshotter": snapshotter,
        "pause": PAUSE_IMAGE,
        "cni": cni,
        "cni_conf": node / "cni",
        "runc": runc,
    }
    # A JSON string is a TOML basic string.
    return _CONTAINERD.format(**{key: json.dumps(str(value)) for key, value in values.items()})


def socket(node: Path) -> Path:
    """Return containerd's socket; a Unix socket's path has at most 107 characters, so it is short."""
    return node / "c.sock"


def cni(node: Path, index: int) -> dict[str, Any]:
    """Return the CNI network of a node: a bridge with a range of its own, and host ports."""
    return {
        "cniVersion": "1.0.0",
        "name": "mlxop",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(node / "addresses"),
                    "ranges": [[{"subnet": pod_subnet(index)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
        ],
    }


def kubelet(node: Path, *, ca: Path, resolv_conf: Path, cgroup: str) -> dict[str, Any]:
    """Return a kubelet's configuration.

    Args:
        node: the node's folder.
        ca: the authority that signs clients' certificates.
        resolv_conf: what pods with dnsPolicy Default get.
        cgroup: the node's cgroup, such as ``/mlxop-default/n1``.
    """
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(ca)},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(resolv_conf),
        "containerRuntimeEndpoint": f"unix://{socket(node)}",
        "volumePluginDir": str(node / "volumeplugins"),
        # Loaded images cannot be pulled again: never collect them.
        "imageGCHighThresholdPercent": 100,
        "nodeStatusUpdateFrequency": "4s",
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
    }


def audit_policy() -> dict[str, Any]:
    """Return the audit policy: who did what to which object, without noise.

    Reads of Leases and Events, probes and discovery are left out; every write is in, with what was sent where tests
    read it: in ModelInstances and Events.
    """
    reads = ["get", "list", "watch"]
    writes = ["create", "update", "patch"]
    return {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived", "ResponseStarted"],
        "rules": [
            {
                "level": "None",
                "verbs": reads,
                "resources": [
                    {"group": "coordination.k8s.io", "resources": ["leases"]},
                    {"group": "", "resources": ["events"]},
                    {"group": "events.k8s.io", "resources": ["events"]},
                ],
            },
            {
                "level": "None",
                "verbs": reads,
                "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version", "/openapi*", "/api*"],
            },
            {
                "level": "Request",
                "verbs": writes,
                "resources": [
                    {"group": "mlx-operator.dev", "resources": ["modelinstances", "modelinstances/status"]},
                    {"group": "events.k8s.io", "resources": ["events"]},
                ],
            },
            {"level": "Metadata"},
        ],
    }


def write_json(path: Path, value: Mapping[str, Any]) -> Path:
    """Write a configuration file (JSON is YAML) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path
