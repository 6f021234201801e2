"""The states of the model: small tuples of numbers, so that equal situations are equal states.

Statuses, reports and places stand in tables and a state holds their numbers. Time is not part of a state: every stored
time is `T0`, and how much of it has passed is chosen anew for each plan (`planner.Age`). Epochs are relative to that of
the status, which is always `BASE`; uids and incarnations are numbered within their rank in the order of their use.
"""

from datetime import UTC, datetime
from enum import IntEnum
from typing import Generic, NamedTuple, TypeVar

from mlx_operator_api.runner import TaskName
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import RunnerReport

T0 = datetime(2026, 11, 23, 15, 0, 0, tzinfo=UTC)
"""What every stored time is made to."""
BASE = 6
"""The epoch of every status that has one; those of the rest count from it."""
UID = "6f1f4e2a-0000-4000-8000-000000000001"
T = TypeVar("T")


class Box(IntEnum):
    """What the kubelet says of a pod and its container."""

    WAITING = 0
    RUNNING = 1
    ENDED = 2
    """The container is terminated and will be started again."""
    FAILED = 3
    """The pod is over: evicted."""


class Pod(NamedTuple):
    """A pod, as the API server has it or as the watch brought it."""

    uid: int
    box: Box
    restarts: int
    node: int
    """On the first or on the second node of its rank."""
    deleting: bool
    ready: bool
    """Its condition Ready; only looked at for rank 0."""


class Process(NamedTuple):
    """A supervisor, with the engines that it runs."""

    incarnation: int
    report: int
    """The newest one, in the table of reports."""
    engines: tuple[int, ...]
    """Epochs of the engines that live."""


class View(NamedTuple):
    """What the operator holds of a supervisor: a register with the last report it read."""

    uid: int
    incarnation: int
    report: int
    connected: bool


class Message(NamedTuple):
    """A task on its way to a pod."""

    uid: int
    task: TaskName
    epoch: int
    attempt: int


class Place(NamedTuple):
    """One rank: the truth, what the operator knows of it, and what is under way."""

    pod: Pod | None = None
    process: Process | None = None
    seen: Pod | None = None
    """The pod as the watch has brought it."""
    view: View | None = None
    record: tuple[int, int] = (0, 0)
    """uid and incarnation in the status."""
    task: Message | None = None
    """The task that was sent last: it may arrive now, later, again or never."""
    older: Message | None = None
    """The one before it: arrives late only as a fault."""
    words: int | None = None
    """The last report of the container that ended."""
    cut: bool = False
    """No network to the pod."""
    lost: int = 0
    """Bits: which of the rank's nodes are NotReady."""
    zombies: tuple[int, ...] = ()
    """Epochs of engines on a lost node whose pod was deleted by force."""

    @property
    def isolated(self) -> bool:
        """Nobody reaches the pod."""
        return self.pod is not None and (self.cut or bool(self.lost >> self.pod.node & 1))


class State(NamedTuple):
    """Everything."""

    status: int
    places: tuple[int, ...]
    faults: int
    """How many may still happen."""
    spent: int
    """Restarts that were paid for since the last sustained Ready, counted by the model itself."""


class Table(Generic[T]):
    """Numbers for things."""

    def __init__(self) -> None:
        self._ids: dict[T, int] = {}
        self._items: list[T] = []

    def id(self, item: T) -> int:
        known = self._ids.get(item)
        if known is None:
            known = self._ids[item] = len(self._items)
            self._items.append(item)
        return known

    def __getitem__(self, number: int) -> T:
        return self._items[number]

    def __len__(self) -> int:
        return len(self._items)


class Tables:
    """The tables of one run."""

    def __init__(self) -> None:
        self.statuses: Table[Status] = Table()
        self.reports: Table[RunnerReport] = Table()
        self.places: Table[Place] = Table()


def number(item: T | None, order: list[T]) -> int:
    """The place of something in the order of first use, from 1; it is added where it is new."""
    if item is None:
        return 0
    if item not in order:
        order.append(item)
    return order.index(item) + 1
