"""Output of the planner: the status to write, then what to do, then what to say. Data, not calls."""

from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, Literal

from mlx_operator_api.conditions import Reason
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import TaskRequest


@dataclass(frozen=True, slots=True)
class CreatePod:
    """Create the instance's Secret (an existing one is fine), then this pod (409 of our own: done)."""

    name: str
    rank: int
    manifest: dict[str, Any]
    secret: str
    """Name of the Secret; its content is made by the port (the planner never sees a token)."""


@dataclass(frozen=True, slots=True)
class DeletePod:
    """Delete a pod; `uid` is a precondition. `grace_seconds` None: the pod's own; 0: by force."""

    name: str
    uid: str
    why: str
    grace_seconds: int | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class ApplyService:
    """Create or correct the client Service (server-side apply)."""

    name: str
    manifest: dict[str, Any]


@dataclass(frozen=True, slots=True)
class SendTask:
    """POST a task to a supervisor."""

    pod: str
    pod_uid: str
    pod_ip: str
    request: TaskRequest


Action = CreatePod | DeletePod | ApplyService | SendTask


class Step(IntEnum):
    """Where an Event stands in the story of its epoch. It is part of its name, by which `kubectl describe` sorts."""

    ASKED = 0
    """Why the epoch is due."""
    CREATED = 1
    WAITING = 2
    """What was in the way before it started."""
    STARTED = 3
    STARTING = 4
    """What was in the way before every rank held its shard."""
    LOADED = 5
    WARMING_UP = 6
    """What was in the way before Ready."""
    READY = 7
    SERVING = 8
    """What was in the way afterwards."""
    FAILED = 9
    OVER = 10
    """What came after that, or ended it on purpose."""


@dataclass(frozen=True, slots=True)
class Notice:
    """An Event regarding the ModelInstance: one per cause and epoch; a repeat is folded into its series."""

    type: Literal["Normal", "Warning"]
    reason: Reason
    note: str
    epoch: int
    action: str
    """What was done or will be done, in one word such as `RestartGroup`."""
    step: Step
    related: tuple[str, str] | None = None
    """Name and uid of the pod it is about."""
    rank: int | None = None
    """Distinguishes events of one reason about several ranks in one epoch."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What follows from an observation. Order of effects: status, then actions, then events."""

    status: Status
    actions: tuple[Action, ...] = ()
    events: tuple[Notice, ...] = ()
    requeue_at: datetime | None = None
    """Plan again at this time even if nothing is observed before (deadlines, back-off)."""
    waits: bool = False
    """Nothing is changed before it is this instance's turn (`Observed.turn`)."""
