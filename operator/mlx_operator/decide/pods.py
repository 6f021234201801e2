"""A pod as the planner sees it: read once from the API server's JSON, everything optional made explicit."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mlx_operator_api import names

from .observed import Manifest
from .spec import time_of


@dataclass(frozen=True, slots=True)
class Terminated:
    """How a container ended, as the kubelet tells it."""

    exit_code: int
    reason: str
    message: str
    finished: datetime | None

    @property
    def signal(self) -> int | None:
        """Number of the signal, by the convention 128 + n."""
        return self.exit_code - 128 if 128 < self.exit_code < 128 + 65 else None


@dataclass(frozen=True, slots=True)
class Container:
    """The runner container. At most one of `running` and `waiting` is set."""

    running: datetime | None = None
    """Since when it runs."""
    waiting: str = ""
    """The kubelet's reason for not running it (yet)."""
    message: str = ""
    """The kubelet's words with that reason."""
    terminated: Terminated | None = None
    """Set while it is ended and not started again."""
    last: Terminated | None = None
    """How the container before this one ended."""
    restarts: int = 0

    @property
    def ended(self) -> Terminated | None:
        """The newest end that is known."""
        return self.terminated or self.last


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod with our label."""

    name: str
    uid: str
    rank: int | None
    owner_uid: str | None
    owner: str
    """Kind and name of its controller, for a message."""
    template_hash: str | None
    created: datetime | None
    deleting: bool
    delete_by: datetime | None
    """When its grace period is over."""
    node: str | None
    ip: str | None
    phase: str
    reason: str
    message: str
    scheduled: bool
    scheduled_at: datetime | None
    schedule_reason: str
    schedule_message: str
    ready: bool
    ready_since: datetime | None
    """When `ready` last changed."""
    ready_words: str
    """The kubelet's words about it."""
    disruption: str
    """Reason and message of DisruptionTarget, when somebody evicts it."""
    memory_limit: str | None
    container: Container
    token_secret: str | None = None
    """Name of the Secret with its token, which tells the operator's key that it was made with."""
    claims: tuple[str, ...] = ()
    """Names of the PersistentVolumeClaims that it mounts."""
    finalizers: tuple[str, ...] = ()
    """What holds it when it is deleted."""

    @property
    def runs(self) -> bool:
        """Its container runs and nobody is deleting it."""
        return self.container.running is not None and not self.deleting and self.phase == "Running"

    @property
    def over(self) -> bool:
        """It will never run again."""
        return self.phase in ("Failed", "Succeeded")


def view(pod: Manifest) -> PodView:
    """Read a pod."""
    metadata, spec, status = pod["metadata"], pod.get("spec") or {}, pod.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    scheduled, disruption = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    ready = conditions.get("Ready", {})
    owner: Mapping[str, Any] = next((o for o in metadata.get("ownerReferences") or () if o.get("controller")), {})
    rank = (metadata.get("labels") or {}).get(names.RANK_LABEL, "")
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        rank=int(rank) if rank.isdecimal() else None,
        owner_uid=owner.get("uid"),
        owner=f"{owner.get('kind')} {owner.get('name')}" if owner else "nobody",
        template_hash=(metadata.get("annotations") or {}).get(names.TEMPLATE_HASH_ANNOTATION),
        created=time_of(metadata.get("creationTimestamp")),
        deleting=metadata.get("deletionTimestamp") is not None,
        delete_by=time_of(metadata.get("deletionTimestamp")),
        node=spec.get("nodeName"),
        ip=_ipv4(status),
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        scheduled=scheduled.get("status") == "True" or bool(spec.get("nodeName")),
        scheduled_at=time_of(scheduled.get("lastTransitionTime")),
        schedule_reason=scheduled.get("reason", ""),
        schedule_message=scheduled.get("message", ""),
        ready=ready.get("status") == "True",
        ready_since=time_of(ready.get("lastTransitionTime")),
        ready_words=_words(ready),
        disruption=_words(disruption) if disruption.get("status") == "True" else "",
        memory_limit=_memory_limit(spec),
        container=_container(status),
        token_secret=_token_secret(spec),
        claims=_claims(spec),
        finalizers=tuple(metadata.get("finalizers") or ()),
    )


def _words(condition: Mapping[str, Any]) -> str:
    return ": ".join(text for text in (condition.get("reason"), condition.get("message")) if text)


def _ipv4(status: Mapping[str, Any]) -> str | None:
    """The pod's IPv4 address: the MLX ring speaks no IPv6."""
    addresses = [entry.get("ip", "") for entry in status.get("podIPs") or ()] + [status.get("podIP") or ""]
    return next((ip for ip in addresses if ip and ":" not in ip), None)


def _container(status: Mapping[str, Any]) -> Container:
    entry: Mapping[str, Any] = next(
        (c for c in status.get("containerStatuses") or () if c.get("name") == names.CONTAINER), {}
    )
    state, last = entry.get("state") or {}, entry.get("lastState") or {}
    waiting = state.get("waiting") or {}
    return Container(
        running=time_of((state.get("running") or {}).get("startedAt")),
        waiting=waiting.get("reason", ""),
        message=waiting.get("message", ""),
        terminated=_terminated(state),
        last=_terminated(last),
        restarts=entry.get("restartCount", 0),
    )


def _terminated(state: Mapping[str, Any]) -> Terminated | None:
    ended = state.get("terminated")
    if ended is None:
        return None
    return Terminated(
        exit_code=ended.get("exitCode", 0),
        reason=ended.get("reason", ""),
        message=ended.get("message", ""),
        finished=time_of(ended.get("finishedAt")),
    )


def _memory_limit(spec: Mapping[str, Any]) -> str | None:
    container: Mapping[str, Any] = next(
        (c for c in spec.get("containers") or () if c.get("name") == names.CONTAINER), {}
    )
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    return None if limit is None else str(limit)


def _token_secret(spec: Mapping[str, Any]) -> str | None:
    volume: Mapping[str, Any] = next((v for v in spec.get("volumes") or () if v.get("name") == "token"), {})
    name: str | None = (volume.get("secret") or {}).get("secretName")
    return name


def _claims(spec: Mapping[str, Any]) -> tuple[str, ...]:
    mounted = (volume.get("persistentVolumeClaim") or {} for volume in spec.get("volumes") or ())
    return tuple(dict.fromkeys(claim["claimName"] for claim in mounted if claim.get("claimName")))
