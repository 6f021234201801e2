"""The production `plan()` on the states of the model: what it sees is built, and what it says is taken apart again.

Each different input is planned once. Time is chosen: a plan happens at once, seconds later, or very late, and only
where the plan before asked to be made again by then.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Any, NamedTuple
from unittest.mock import patch

from mlx_operator.decide import plan as planning
from mlx_operator.decide import pods, service, spec, template
from mlx_operator.decide.actions import Action, CreatePod, DeletePod, Plan, SendTask
from mlx_operator.decide.observed import Manifest, NodeView, Observed, RunnerView, Settings
from mlx_operator.decide.plan import plan
from mlx_operator.decide.spec import Wanted
from mlx_operator_api import names
from mlx_operator_api.base import format_time
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import RunnerReport

from . import normal, safety
from .state import BASE, T0, UID, Box, Message, Place, Pod, Tables, View

_view = pods.view
Planner = Callable[[Observed, datetime], Plan]
IMAGE = "runner:1"
_STAMP = format_time(T0)


class Age(IntEnum):
    """How much time has passed since everything that is stored."""

    YOUNG = 0
    """Nothing is due yet."""
    SHORT = 1
    """Seconds: what a cause is waited for, the back-off, the delay of a write; no deadline."""
    LONG = 2
    """Longer than every deadline."""

    @property
    def passed(self) -> timedelta:
        return timedelta(seconds=(0.5, 7.0, 4000.0)[self])


class Sight(NamedTuple):
    """What the operator sees of a rank."""

    seen: Pod | None
    view: View | None
    fresh: bool
    """The stream stands in truth: heartbeats arrive."""
    record: tuple[int, int]
    lost: int


class Create(NamedTuple):
    rank: int


class Delete(NamedTuple):
    rank: int
    uid: int
    force: bool


class Send(NamedTuple):
    rank: int
    message: Message


Effect = Create | Delete | Send


class Decision(NamedTuple):
    """What a plan does to the state."""

    status: int
    grown: int
    """By how much the epoch grew: all others count from it."""
    records: tuple[tuple[int, int], ...]
    effects: tuple[Effect, ...]
    written: bool
    spent: int
    """Restarts that it pays for."""
    fresh_budget: bool
    again: Age | None
    """When it wants to be made again."""
    broken: str | None
    """The promise that it breaks."""


class Operator:
    """Plans for one ModelInstance."""

    def __init__(self, tables: Tables, size: int, budget: int, planner: Planner = plan) -> None:
        self.size = size
        self.budget = budget
        self._tables = tables
        self._planner = planner
        self._known: dict[tuple[int, tuple[Sight, ...], Age], Decision] = {}
        self._raw: dict[int, Mapping[str, Any]] = {}
        self._manifests: dict[tuple[int, Pod], dict[str, Any]] = {}
        self._heard: dict[tuple[int, View], RunnerReport] = {}
        self._settings = Settings(runner_image=IMAGE, key_id="abcdef0123", started=T0)
        self._instance: dict[str, Any] = {
            "metadata": {"name": "tiny", "namespace": "default", "uid": UID, "generation": 1, "resourceVersion": "1"},
            "spec": {
                "model": {"source": "pvc://models/tiny"},
                "runners": size,
                "restartPolicy": {"maxRestarts": budget},
                "deadlines": {"download": "10m", "unreachable": "15s"},
            },
        }
        self._wanted = wanted = spec.parse(self._instance)
        self._views: dict[int, pods.PodView] = {}
        self._service = service.manifest(wanted)
        self._pods = [template.pod(wanted, rank, IMAGE, self._settings) for rank in range(size)]

    @property
    def plans(self) -> int:
        """How many different inputs were planned."""
        return len(self._known)

    @staticmethod
    def sight(place: Place) -> Sight:
        """What can be seen of a place."""
        view, process = place.view, place.process
        here = view is not None and process is not None and view.incarnation == process.incarnation
        fresh = here and view is not None and view.connected and not place.isolated
        return Sight(place.seen, view, fresh, place.record, place.lost)

    def decide(self, status: int, sights: tuple[Sight, ...], age: Age) -> Decision:
        """The plan for what is seen."""
        if age is Age.YOUNG:
            # No heartbeat is overdue yet.
            sights = tuple(sight if sight.fresh else sight._replace(fresh=True) for sight in sights)
        key = (status, sights, age)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._decide(status, sights, age)
        return known

    @contextlib.contextmanager
    def _read_once(self) -> Iterator[None]:
        """The spec is the same in every plan, and so are most pods: each is parsed once."""
        with patch.object(planning, "parse", self._parse), patch.object(pods, "view", self._view):
            yield

    def _parse(self, instance: Manifest) -> Wanted:
        # A planner with a bug may look at another one.
        return self._wanted if instance["spec"] is self._instance["spec"] else spec.parse(instance)

    def _view(self, pod: Manifest) -> pods.PodView:
        """Manifests are kept for ever, so that none takes the place of another."""
        known = self._views.get(id(pod))
        if known is None:
            known = self._views[id(pod)] = _view(pod)
        return known

    def observed(self, status: int, sights: tuple[Sight, ...], now: datetime) -> Observed:
        """The input of the planner."""
        pods, runners, nodes = [], {}, {}
        for rank, sight in enumerate(sights):
            if sight.seen is not None:
                pods.append(self._manifest(rank, sight.seen))
            if sight.view is not None:
                view = sight.view
                runners[_uid(rank, view.uid)] = RunnerView(
                    report=self._report(rank, view),
                    received=now if sight.fresh else T0,
                    connected=view.connected,
                    error=None if view.connected else "connection lost",
                )
            for number in (0, 1):
                name, lost = normal.node(rank, number), bool(sight.lost >> number & 1)
                nodes[name] = NodeView(name, not lost, T0 if lost else None, "NodeStatusUnknown" if lost else "")
        return Observed(
            instance={**self._instance, "status": self._status(status, sights)},
            pods=tuple(pods),
            settings=self._settings,
            service=self._service,
            runners=runners,
            nodes=nodes,
        )

    def _decide(self, status: int, sights: tuple[Sight, ...], age: Age) -> Decision:
        now = T0 + age.passed
        stored = self._tables.statuses[status]
        observed = self.observed(status, sights, now)
        with self._read_once():
            made = self._planner(observed, now)
        grown = made.status.epoch - BASE if made.status.epoch else 0
        after = self._tables.statuses.id(normal.status(made.status, grown, now=now))
        records = tuple(
            (_number(record.pod_uid), _number(record.incarnation)) for record in made.status.runners
        ) or tuple(sight.record for sight in sights)
        effects = tuple(effect for action in made.actions if (effect := _effect(action)) is not None)
        written = after != status or any(record != sight.record for record, sight in zip(records, sights, strict=True))
        due = None if made.requeue_at is None else made.requeue_at - T0
        again = None if due is None else next((a for a in Age if due <= a.passed), None)
        return Decision(
            status=after,
            grown=grown,
            records=records,
            effects=effects,
            written=written,
            spent=safety.paid(stored, made.status),
            fresh_budget=safety.sustained(stored),
            again=again,
            broken=safety.of_decision(stored, made.status, self.budget),
        )

    def _status(self, number: int, sights: tuple[Sight, ...]) -> dict[str, Any]:
        raw = self._raw.get(number)
        if raw is None:
            found: Status = self._tables.statuses[number]
            raw = self._raw[number] = found.model_dump(mode="json", by_alias=True, exclude_none=True)
        if "runners" not in raw or not raw["runners"]:
            return dict(raw)
        runners = []
        for entry, sight in zip(raw["runners"], sights, strict=True):
            uid, incarnation = sight.record
            more = {"podUID": _uid(entry["rank"], uid)} if uid else {}
            more |= {"incarnation": f"i-{incarnation}"} if incarnation else {}
            runners.append({**entry, **more})
        return {**raw, "runners": runners}

    def _report(self, rank: int, view: View) -> RunnerReport:
        key = (rank, view._replace(uid=0, connected=True))
        known = self._heard.get(key)
        if known is None:
            update = {"rank": rank, "incarnation": f"i-{view.incarnation}"}
            known = self._heard[key] = self._tables.reports[view.report].model_copy(update=update)
        return known

    def _manifest(self, rank: int, pod: Pod) -> dict[str, Any]:
        known = self._manifests.get((rank, pod))
        if known is None:
            known = self._manifests[rank, pod] = _manifest(self._pods[rank], rank, pod)
        return known


def _uid(rank: int, number: int) -> str:
    return f"pod-{rank}-{number}"


def _number(text: str | None) -> int:
    return 0 if text is None else int(text.rpartition("-")[2])


def _effect(action: Action) -> Effect | None:
    match action:
        case CreatePod():
            return Create(action.rank)
        case DeletePod():
            rank = int(action.name.rpartition("-")[2])
            return Delete(rank, _number(action.uid), action.grace_seconds == 0)
        case SendTask():
            request = action.request
            return Send(
                request.rank, Message(_number(action.pod_uid), request.task.name, request.epoch, request.attempt)
            )
        case _:
            return None


def _manifest(base: dict[str, Any], rank: int, pod: Pod) -> dict[str, Any]:
    metadata = {**base["metadata"], "uid": _uid(rank, pod.uid), "creationTimestamp": _STAMP}
    if pod.deleting:
        metadata["deletionTimestamp"] = _STAMP
    conditions = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": _STAMP},
        {"type": "Ready", "status": "True" if pod.ready else "False"},
    ]
    status: dict[str, Any] = {"conditions": conditions, **_container(pod)}
    if pod.box in (Box.RUNNING, Box.ENDED):
        status["podIP"] = f"10.0.{rank}.{pod.uid}"
    return {
        "metadata": metadata,
        "spec": {**base["spec"], "nodeName": normal.node(rank, pod.node)},
        "status": status,
    }


def _container(pod: Pod) -> dict[str, Any]:
    ended = {"terminated": {"exitCode": 137, "reason": "Error", "finishedAt": _STAMP}}
    entry: dict[str, Any] = {"name": names.CONTAINER, "restartCount": pod.restarts}
    if pod.restarts:
        entry["lastState"] = ended
    match pod.box:
        case Box.WAITING:
            entry["state"] = {"waiting": {"reason": "ContainerCreating"}}
            return {"phase": "Pending", "containerStatuses": [entry]}
        case Box.RUNNING:
            entry["state"] = {"running": {"startedAt": _STAMP}}
        case Box.ENDED:
            entry["state"] = ended
        case Box.FAILED:
            return {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    return {"phase": "Running", "containerStatuses": [entry]}
