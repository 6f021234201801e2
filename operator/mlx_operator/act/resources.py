"""The kinds of the Kubernetes API that the operator touches, and their paths."""

from dataclasses import dataclass

from mlx_operator_api import names


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind, as discovery names it; `group` is empty for the core group."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """`apiVersion` of its objects."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of the collection (no `name`), of one object, or of its subresource."""
        parts = ["apis", self.group] if self.group else ["api"]
        parts.append(self.version)
        if self.namespaced and namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part is not None]
        return "/" + "/".join(parts)


INSTANCES = Resource(names.GROUP, names.VERSION, names.PLURAL, names.KIND)
PODS = Resource("", "v1", "pods", "Pod")
SERVICES = Resource("", "v1", "services", "Service")
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
SECRETS = Resource("", "v1", "secrets", "Secret")
CORE_EVENTS = Resource("", "v1", "events", "Event")
"""What the scheduler and the kubelet say, readable by the uid of the object it is about."""
EVENTS = Resource("events.k8s.io", "v1", "events", "Event")
"""What we say ourselves."""
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
