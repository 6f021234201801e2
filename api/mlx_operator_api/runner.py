"""The runner's state machine: states, tasks and the one transition table.

The supervisor decides by this table, the planner sends nothing that it would reject, and the documentation is
generated from it. Guards are on `world_size`, never on a nullable handle of a group: a runner that is Connected may
load, whatever its engine returned from connect.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import Field

from .base import Strict


class RunnerState(StrEnum):
    """State of one rank, as `status.runners[].state` and every report spell it."""

    PENDING = "RunnerPending"
    """No pod runs yet, its supervisor was not heard from, or it has no runner yet."""
    IDLE = "RunnerIdle"
    CONNECTING = "RunnerConnecting"
    CONNECTED = "RunnerConnected"
    LOADING = "RunnerLoading"
    LOADED = "RunnerLoaded"
    WARMING_UP = "RunnerWarmingUp"
    READY = "RunnerReady"
    RUNNING = "RunnerRunning"
    SHUTTING_DOWN = "RunnerShuttingDown"
    SHUTDOWN = "RunnerShutdown"
    FAILED = "RunnerFailed"


TRANSIENT = frozenset({RunnerState.CONNECTING, RunnerState.LOADING, RunnerState.WARMING_UP, RunnerState.SHUTTING_DOWN})
"""States in which the engine works on a task; each has a deadline."""
SERVING = frozenset({RunnerState.READY, RunnerState.RUNNING})
ENDED = frozenset({RunnerState.SHUTDOWN, RunnerState.FAILED})
ORDER: Mapping[RunnerState, int] = {state: index for index, state in enumerate(RunnerState)}
"""Within an epoch a state never goes back in this order, but Running returns to Ready."""


class TaskName(StrEnum):
    """What a runner can be told."""

    CREATE_RUNNER = "CreateRunner"
    DOWNLOAD_MODEL = "DownloadModel"
    CONNECT_TO_GROUP = "ConnectToGroup"
    LOAD_MODEL = "LoadModel"
    START_WARMUP = "StartWarmup"
    TEXT_GENERATION = "TextGeneration"
    CANCEL_TASK = "CancelTask"
    SHUTDOWN = "Shutdown"


REQUESTS = frozenset({TaskName.TEXT_GENERATION, TaskName.CANCEL_TASK})
"""Tasks that come from clients through the public API, never from the operator."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One row of the table.

    `group` and `single` are the states that accept the task with world_size > 1 and == 1; `via` is the transient
    state it passes through (None: none), `to` the state it settles in (None: the state stays).
    """

    group: frozenset[RunnerState]
    single: frozenset[RunnerState]
    via: RunnerState | None
    to: RunnerState | None


def _states(*states: RunnerState) -> frozenset[RunnerState]:
    return frozenset(states)


_S = RunnerState
TRANSITIONS: Mapping[TaskName, Transition] = {
    # A newer epoch may start in any state: the old engine is killed and waited for first.
    TaskName.CREATE_RUNNER: Transition(frozenset(_S), frozenset(_S), None, _S.IDLE),
    TaskName.DOWNLOAD_MODEL: Transition(_states(_S.IDLE), _states(_S.IDLE), None, None),
    TaskName.CONNECT_TO_GROUP: Transition(_states(_S.IDLE), _states(), _S.CONNECTING, _S.CONNECTED),
    TaskName.LOAD_MODEL: Transition(_states(_S.CONNECTED), _states(_S.IDLE), _S.LOADING, _S.LOADED),
    TaskName.START_WARMUP: Transition(_states(_S.LOADED), _states(_S.LOADED), _S.WARMING_UP, _S.READY),
    TaskName.TEXT_GENERATION: Transition(SERVING, SERVING, None, _S.RUNNING),
    TaskName.CANCEL_TASK: Transition(_states(_S.RUNNING), _states(_S.RUNNING), None, None),
    # Also while a transient state is stuck: the engine can always be killed.
    TaskName.SHUTDOWN: Transition(
        frozenset(_S) - {_S.PENDING}, frozenset(_S) - {_S.PENDING}, _S.SHUTTING_DOWN, _S.SHUTDOWN
    ),
}


def accepted_in(task: TaskName, world_size: int) -> frozenset[RunnerState]:
    """The states in which a runner of this world size accepts the task (of its own epoch)."""
    row = TRANSITIONS[task]
    return row.group if world_size > 1 else row.single


def tasks_accepted(state: RunnerState, world_size: int) -> frozenset[TaskName]:
    """The tasks that a runner in this state accepts."""
    return frozenset(task for task in TaskName if state in accepted_in(task, world_size))


class TaskRejected(Strict):
    """A task that was not accepted: data, not an exception. The runner's state is unchanged."""

    task: TaskName
    why: str
    """One clause for a person."""
    state: RunnerState
    task_epoch: int
    epoch: int
    """Epoch of the runner; 0 when there is none yet."""
    world_size: int
    rank: int
    group: str
    """`present` or `absent`: whether the engine holds a group. Told for a person, never a guard."""
    accepted_in: tuple[RunnerState, ...]
    """States that would have accepted the task."""
    tasks_accepted: tuple[TaskName, ...]
    """Tasks that the runner accepts now."""

    def line(self) -> str:
        """The rejection as one line, for logs, events and conditions."""
        states = ", ".join(self.accepted_in) or "no state of this world size"
        return (
            f"{self.task} rejected: {self.why}: state={self.state} world_size={self.world_size} rank={self.rank} "
            f"epoch={self.epoch} task_epoch={self.task_epoch} group={self.group} accepted_in=[{states}]"
        )


class Standing(Strict):
    """Where a runner stands: all that the decision on a task depends on."""

    state: RunnerState = RunnerState.PENDING
    epoch: int = Field(0, ge=0)
    """0: no runner yet."""
    world_size: int = Field(1, ge=1)
    rank: int = Field(0, ge=0)
    group: str = "absent"
    model_available: bool = False


def judge(task: TaskName, epoch: int, standing: Standing) -> TaskRejected | None:
    """Decide on a task of `epoch`: None accepts it, anything else says why not. Total and free of effects."""
    why = _objection(task, epoch, standing)
    if why is None:
        return None
    return TaskRejected(
        task=task,
        why=why,
        state=standing.state,
        task_epoch=epoch,
        epoch=standing.epoch,
        world_size=standing.world_size,
        rank=standing.rank,
        group=standing.group,
        accepted_in=_sorted_states(accepted_in(task, standing.world_size)),
        tasks_accepted=tuple(t for t in TaskName if t in tasks_accepted(standing.state, standing.world_size)),
    )


def _objection(task: TaskName, epoch: int, standing: Standing) -> str | None:
    if task is TaskName.CREATE_RUNNER:
        if epoch <= standing.epoch:
            return f"this runner is already of epoch {standing.epoch}"
        return None
    if standing.epoch == 0:
        return "there is no runner yet: CreateRunner comes first"
    if epoch != standing.epoch:
        return f"the task is of epoch {epoch}, the runner of epoch {standing.epoch}"
    if standing.state not in accepted_in(task, standing.world_size):
        return f"not in {standing.state} with world_size {standing.world_size}"
    if task is TaskName.LOAD_MODEL and not standing.model_available:
        return "the model is not available yet: DownloadModel comes first"
    return None


def _sorted_states(states: frozenset[RunnerState]) -> tuple[RunnerState, ...]:
    return tuple(sorted(states, key=lambda state: ORDER[state]))
