"""A ModelInstance in a test: apply, wait, ask, look."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from tests.node.kube import Kubectl, Object, UnmetError, wait_for

READY_SECONDS = 120.0
"""Far more than it takes, for a busy machine."""


def manifest(name: str, source: str, **spec: Any) -> Object:
    """A ModelInstance with the resources that fit the test cluster."""
    runner = {"resources": {"limits": {"memory": "1Gi"}, "requests": {"cpu": "50m", "memory": "128Mi"}}}
    runner.update(spec.pop("runner", {}))
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name},
        "spec": {"model": {"source": source}, "runner": runner, **spec},
    }


def one_per_node(instance: str) -> Object:
    """`spec.runner` with an anti-affinity that puts each rank on a node of its own."""
    term = {
        "labelSelector": {"matchLabels": {names.INSTANCE_LABEL: instance}},
        "topologyKey": "kubernetes.io/hostname",
    }
    return {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}}


@dataclass
class Instance:
    """A ModelInstance on a cluster."""

    kubectl: Kubectl
    namespace: str
    name: str
    seen: list[Object] = field(default_factory=list)

    def read(self) -> Object:
        """The object now."""
        found = self.kubectl.get(names.KIND, self.name, self.namespace)
        assert found is not None, f"ModelInstance {self.name} is gone"
        return found

    def status(self) -> Object:
        """Its status; empty before the first pass."""
        return dict(self.read().get("status") or {})

    def condition(self, kind: ConditionType) -> Object:
        """One condition; empty before the first pass."""
        return next((c for c in self.status().get("conditions", []) if c["type"] == kind), {})

    def wait(self, what: str, check: Callable[[Object], Any], timeout: float = READY_SECONDS) -> Any:
        """Wait until `check(status)` is true and return its value; describes the instance when it is not."""
        try:
            return wait_for(what, lambda: check(self.status()), timeout)
        except UnmetError as error:
            raise UnmetError(f"{error}\n{self.describe()}\n{self.logs()}") from None

    def wait_condition(
        self, kind: ConditionType, status: str, reason: Reason | None = None, timeout: float = READY_SECONDS
    ) -> Object:
        """Wait for a condition of the current generation."""

        def check(_: Object) -> Object | None:
            instance = self.read()
            for c in (instance.get("status") or {}).get("conditions", []):
                current = c.get("observedGeneration") == instance["metadata"]["generation"]
                if c["type"] == kind and c["status"] == status and current and reason in (None, c["reason"]):
                    return dict(c)
            return None

        return dict(self.wait(f"{kind}={status} {reason or ''}", check, timeout))

    def wait_ready(
        self,
        epoch: int | None = None,
        timeout: float = READY_SECONDS,
        meanwhile: Callable[[Object], None] = lambda _: None,
    ) -> Object:
        """Wait until Ready (in at least this epoch) and return the status; `meanwhile` looks at each one read."""

        def check(status: Object) -> Object | None:
            meanwhile(status)
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
            return status if ready and (epoch is None or status.get("epoch", 0) >= epoch) else None

        return dict(self.wait(f"Ready in epoch {epoch or 'any'}", check, timeout))

    def pods(self) -> dict[int, Object]:
        """Pods by rank, terminating ones left out."""
        found = self.kubectl.items("pods", self.namespace, f"{names.INSTANCE_LABEL}={self.name}")
        return {
            int(p["metadata"]["labels"][names.RANK_LABEL]): p
            for p in found
            if not p["metadata"].get("deletionTimestamp")
        }

    def uids(self) -> dict[int, str]:
        """Pod uids by rank: another uid is another pod."""
        return {rank: pod["metadata"]["uid"] for rank, pod in self.pods().items()}

    def describe(self) -> str:
        """What the on-call engineer reads."""
        return self.kubectl.run("describe", names.KIND, self.name, "-n", self.namespace, check=False)

    def logs(self, lines: int = 40) -> str:
        """The ends of all runners' logs."""
        selector = f"{names.INSTANCE_LABEL}={self.name}"
        return self.kubectl.run(
            "logs", "-n", self.namespace, "-l", selector, "--prefix", f"--tail={lines}", "--ignore-errors", check=False
        )

    def events(self) -> list[Object]:
        """Events that `kubectl describe` shows, by name."""
        uid = self.read()["metadata"]["uid"]
        found = self.kubectl.items("events.events.k8s.io", self.namespace)
        mine = [e for e in found if e.get("regarding", {}).get("uid") == uid]
        return sorted(mine, key=lambda e: str(e["metadata"]["name"]))

    def restart(self, value: str = "now") -> None:
        """Ask for a new epoch in the same pods, by annotation."""
        patch = {"metadata": {"annotations": {names.RESTART_ANNOTATION: value}}}
        self.kubectl.patch("mi", self.name, self.namespace, patch)

    def delete(self, timeout: float = 60) -> None:
        """Delete it and wait until no child is left."""
        self.kubectl.run("delete", names.KIND, self.name, "-n", self.namespace, timeout=timeout)
        selector = f"{names.INSTANCE_LABEL}={self.name}"
        for kind in ("pods", "services", "secrets"):
            wait_for(f"no {kind} left", partial(self._none_left, kind, selector), timeout)

    def _none_left(self, kind: str, selector: str) -> bool:
        return not self.kubectl.items(kind, self.namespace, selector)


def seconds_since(start: float) -> str:
    """For printed figures."""
    return f"{time.monotonic() - start:.2f} s"
