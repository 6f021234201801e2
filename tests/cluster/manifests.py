"""What runs inside the cluster from the start: CoreDNS, as a Deployment like everywhere else."""

from typing import Any

DNS_ADDRESS = "10.96.0.10"
COREDNS_IMAGE = "localhost/coredns:1"
# kubeadm's value. A shorter one would make stale DNS answers vanish from the tests that users have to live with.
DNS_CACHE_SECONDS = 30

_COREFILE = f"""\
.:53 {{
  errors
  ready
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    pods insecure
    ttl {DNS_CACHE_SECONDS}
  }}
  cache {DNS_CACHE_SECONDS}
}}
"""
_META = {"name": "coredns", "namespace": "kube-system"}
_LABELS = {"k8s-app": "kube-dns"}


def coredns() -> list[dict[str, Any]]:
    """Return the objects of CoreDNS: account, role, configuration, Deployment, Service."""
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _META},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "coredns"},
            "rules": [
                {
                    "apiGroups": [""],
                    "resources": ["endpoints", "services", "pods", "namespaces"],
                    "verbs": ["list", "watch"],
                },
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "coredns"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "coredns"},
            "subjects": [{"kind": "ServiceAccount", **_META}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _META, "data": {"Corefile": _COREFILE}},
        _deployment(),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": _LABELS},
            "spec": {
                "clusterIP": DNS_ADDRESS,
                "selector": _LABELS,
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                ],
            },
        },
    ]


def _deployment() -> dict[str, Any]:
    container = {
        "name": "coredns",
        "image": COREDNS_IMAGE,
        "imagePullPolicy": "Never",
        "args": ["-conf", "/etc/coredns/Corefile"],
        "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "50m", "memory": "32Mi"}},
    }
    # DNS must outlive the loss of the node it happens to run on within a test's patience.
    gone = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**_META, "labels": _LABELS},
        "spec": {
            "selector": {"matchLabels": _LABELS},
            "template": {
                "metadata": {"labels": _LABELS},
                "spec": {
                    "serviceAccountName": "coredns",
                    "dnsPolicy": "Default",
                    "priorityClassName": "system-cluster-critical",
                    "terminationGracePeriodSeconds": 5,
                    "tolerations": [
                        {"key": "node.kubernetes.io/not-ready", **gone},
                        {"key": "node.kubernetes.io/unreachable", **gone},
                    ],
                    "containers": [container],
                    "volumes": [{"name": "config", "configMap": {"name": "coredns"}}],
                },
            },
        },
    }
