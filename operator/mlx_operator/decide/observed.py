"""Input of the planner: everything that was observed of one ModelInstance, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mlx_operator_api.tasks import RunnerReport

Manifest = Mapping[str, Any]
"""A Kubernetes object as JSON."""
GATEWAY_TIMEOUT = 504
BAD_REQUEST = (400, 403, 409, 413, 422)


@dataclass(frozen=True, slots=True)
class RunnerView:
    """What is known of the supervisor in one pod, by the pod's uid."""

    report: RunnerReport | None = None
    """The newest report; None: none reached this process yet."""
    received: datetime | None = None
    """When the newest report or heartbeat arrived."""
    connected: bool = False
    """The report stream stands."""
    error: str | None = None
    """Why the stream does not stand, or why the last report could not be decoded."""
    undecodable: bool = False
    """The last thing received was no report that this release can read."""
    repeated: int = 0
    """The `seq` of the newest heartbeat that said the same again; 0: none since that report."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node: `ready` is its Ready condition (False also for Unknown)."""

    name: str
    ready: bool
    since: datetime | None = None
    reason: str = ""
    cordoned: bool = False
    """No pod is placed there any more: `kubectl cordon`, or a drain."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The API server's last answer to an attempt to create a child, or to delete a pod."""

    status: int
    """HTTP status: 400 or 403 quota or policy, 409 the name belongs to somebody else, 422 invalid, 500 a webhook,
    504 the API server's own time was over."""
    message: str
    time: datetime

    @property
    def lasting(self) -> bool:
        """The answer stays the same until somebody changes something."""
        return self.status in BAD_REQUEST

    @property
    def unfinished(self) -> bool:
        """The API server's time was over: it may have done it or not, which shows by itself."""
        return self.status == GATEWAY_TIMEOUT


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator's own configuration contributes."""

    runner_image: str
    """Default image of the runner, from the chart."""
    key_id: str
    """Identifies the operator's key; part of the name of each instance's Secret."""
    image_pull_policy: str | None = None
    lease_transitions: int = 0
    """Of our leadership; carried by every task."""
    started: datetime | None = None
    """When this process began to observe."""
    watch_nodes: bool = True
    """False when confined to namespaces: nodes are then unknown, their loss is read from the pods."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One ModelInstance with everything around it."""

    instance: Manifest
    """The ModelInstance as the API server has it."""
    pods: tuple[Manifest, ...]
    """Pods with our label for this instance, also terminating ones and those that are not ours."""
    settings: Settings
    service: Manifest | None = None
    """The object with our Service's name, whoever owns it."""
    runners: Mapping[str, RunnerView] = field(default_factory=dict)
    """By pod uid."""
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    """By name of the child that is to be created, by uid of the pod that is to be deleted; removed when a later attempt
    succeeds."""
    turn: bool = True
    """It may be restarted for a new key of the operator: of those that still serve, one at a time is."""
    pod_events: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By pod uid: what Events say of a pod that waits, or of a container that ended of late, newest first (the
    scheduler's and the kubelet's own words); not read for pods that run."""
