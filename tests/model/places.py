"""What can happen to one rank by itself: kubelet, network, watch, supervisor and engine, and its faults.

A step is (actor, words, the place after it); in the words `RANK` stands for the rank.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import SERVING, RunnerState, TaskName

from .planner import Create, Delete, Effect, Send
from .state import Box, Message, Place, Pod, Tables, View, number
from .supervisors import Supervisors


class Step(NamedTuple):
    """One step of one rank."""

    actor: str
    words: str
    place: int
    heals: bool = False
    """The end of a fault."""


class Kind(NamedTuple):
    """What the form of a place depends on besides itself."""

    first: bool
    """It is of rank 0: only there readiness is looked at."""
    calm: bool
    """No fault is to come: what could only matter after one is left out."""


class Places:
    """Steps of places, each worked out once."""

    def __init__(self, tables: Tables, supervisors: Supervisors) -> None:
        self._tables = tables
        self._supervisors = supervisors
        self._steps: dict[tuple[int, Kind], tuple[Step, ...]] = {}
        self._faults: dict[tuple[int, Kind], tuple[Step, ...]] = {}
        self._acted: dict[tuple[int, Effect, Kind], int] = {}
        self._recorded: dict[tuple[int, tuple[int, int], Kind], int] = {}

    # -- what goes on
    def steps(self, place: int, kind: Kind) -> tuple[Step, ...]:
        """What goes on by itself."""
        key = (place, kind)
        if key not in self._steps:
            found = (self._step(place, kind, *step) for step in self._all_steps(self._tables.places[place]))
            self._steps[key] = tuple(step for step in found if step.place != place)
        return self._steps[key]

    def faults(self, place: int, kind: Kind) -> tuple[Step, ...]:
        """What can go wrong."""
        key = (place, kind)
        if key not in self._faults:
            found = (self._step(place, kind, *step) for step in self._all_faults(self._tables.places[place]))
            self._faults[key] = tuple(step for step in found if step.place != place)
        return self._faults[key]

    def _step(self, place: int, kind: Kind, actor: str, words: str, after: Place, heals: bool = False) -> Step:
        return Step(actor, words, self.tidy(after, kind), heals)

    def _all_steps(self, place: Place) -> Iterator[tuple[str, str, Place] | tuple[str, str, Place, bool]]:
        yield from self._network(place)
        yield from self._kubelet(place)
        if place.process is not None:
            yield from self._engine(place)
        if place.lost:
            yield "heal", "the lost node of RANK is back", place._replace(lost=0, zombies=()), True
        if place.cut:
            yield "heal", "the network to RANK is back", place._replace(cut=False), True

    def _network(self, place: Place) -> Iterator[tuple[str, str, Place]]:
        pod, seen, process, view = place.pod, place.seen, place.process, place.view
        if seen != pod:
            yield "watch", "the watch brings the pod of RANK", place._replace(seen=pod)
        reached = pod is not None and process is not None and not place.isolated
        if reached and pod is not None and process is not None and seen is not None:
            if seen.uid == pod.uid and seen.box is Box.RUNNING:
                heard = View(pod.uid, process.incarnation, self._supervisors.heard(process.report), True)
                words = f"the operator hears RANK: {self._told(process.report)}"
                yield "hear", words, place._replace(view=heard)
        elif view is not None and view.connected:
            lost = place._replace(view=view._replace(connected=False))
            yield "hear", "the operator notices that the stream of RANK is broken", lost
        message = place.task
        if message is not None and reached:
            yield "deliver", f"{self._named(message)} arrives at RANK", self._deliver(place, message)

    def _deliver(self, place: Place, message: Message) -> Place:
        if place.process is None or place.pod is None or place.pod.uid != message.uid:
            return place
        return place._replace(process=self._supervisors.offer(place.process, message))

    def _kubelet(self, place: Place) -> Iterator[tuple[str, str, Place]]:
        pod, process = place.pod, place.process
        if pod is None or place.lost >> pod.node & 1:
            return
        if pod.deleting:
            if process is None or not process.engines:
                yield "kubelet", "the pod of RANK is gone", vanished(place)
            else:
                told = place._replace(process=self._supervisors.told_to_stop(process))
                draining = self._tables.reports[process.report].draining
                words = "shuts its engine down" if draining else "is told to stop"
                yield "kubelet", f"the supervisor of RANK {words}", told
        elif process is None and pod.box is not Box.FAILED:
            again = pod.box is Box.ENDED
            running = pod._replace(box=Box.RUNNING, restarts=1 if again else pod.restarts)
            started = place._replace(
                pod=running,
                # Late news of a first start are no other situation than a late start.
                seen=place.seen if again or place.seen != pod else running,
                process=self._supervisors.start(place.words, self._incarnation(place)),
                words=None,
            )
            yield "kubelet", f"the container of RANK starts{' again' if again else ''}", started

    def _incarnation(self, place: Place) -> int:
        known = (place.view.incarnation if place.view else 0, place.record[1])
        return max(known) + 1

    def _engine(self, place: Place) -> Iterator[tuple[str, str, Place]]:
        process = place.process
        assert process is not None
        report = self._tables.reports[process.report]
        if report.state is RunnerState.SHUTTING_DOWN:
            yield "engine", "the engine of RANK has ended", place._replace(process=self._supervisors.ended(process))
            return
        name = self._supervisors.running(process.report)
        if name in (TaskName.CREATE_RUNNER, TaskName.DOWNLOAD_MODEL, TaskName.LOAD_MODEL):
            done = place._replace(process=self._supervisors.complete(process))
            yield "engine", f"RANK has done {name}", done

    # -- what goes wrong
    def _all_faults(self, place: Place) -> Iterator[tuple[str, str, Place]]:
        pod, process = place.pod, place.process
        if pod is None:
            return
        if process is not None:
            yield from self._process_faults(place)
            words = process.report
            ended = place._replace(process=None, words=words, pod=pod._replace(box=Box.ENDED))
            yield "container", "the container of RANK is killed", ended
        if not pod.deleting:
            yield "delete", "somebody deletes the pod of RANK", place._replace(pod=pod._replace(deleting=True))
            if pod.box is not Box.FAILED:
                evicted = place._replace(process=None, words=None, pod=pod._replace(box=Box.FAILED))
                yield "evict", "the pod of RANK is evicted", evicted
        if not place.lost:
            yield "node", "the node of RANK is lost", place._replace(lost=1 << pod.node)
        if process is not None and not place.isolated:
            yield "cut", "the network to RANK is cut", place._replace(cut=True)

    def _process_faults(self, place: Place) -> Iterator[tuple[str, str, Place]]:
        process = place.process
        assert process is not None
        report, name = self._tables.reports[process.report], self._supervisors.running(process.report)
        if self._supervisors.works(report) and process.engines:
            died = self._supervisors.fail(process, Reason.ENGINE_CRASHED)
            yield "engine", f"the engine of RANK is killed in {report.state}", place._replace(process=died)
        if report.state is RunnerState.LOADING:
            short = self._supervisors.fail(process, Reason.INSUFFICIENT_MEMORY)
            yield "engine", "the model does not fit into the memory of RANK", place._replace(process=short)
        if name is TaskName.DOWNLOAD_MODEL:
            failed = self._supervisors.fail_download(process)
            yield "download", "the download of RANK fails", place._replace(process=failed)
        if place.older is not None and not place.isolated:
            words = f"{self._named(place.older)}, sent before, arrives late at RANK"
            yield "reorder", words, self._deliver(place, place.older)

    # -- what the operator does
    def act(self, place: int, effect: Effect, kind: Kind) -> int:
        """An action of the operator, as the API server and the network carry it out."""
        key = (place, effect, kind)
        if key not in self._acted:
            self._acted[key] = self.tidy(self._act(self._tables.places[place], effect), kind)
        return self._acted[key]

    def _act(self, place: Place, effect: Effect) -> Place:
        pod = place.pod
        match effect:
            case Create() if pod is None:
                new = Pod(self._uid(place), Box.WAITING, 0, 1 if place.lost & 1 else 0, False, False)
                return place._replace(pod=new, seen=new)
            case Create():
                return place._replace(seen=pod)
            case Delete() if pod is not None and pod.uid == effect.uid:
                if effect.force:
                    return vanished(place)._replace(seen=None)
                going = pod._replace(deleting=True)
                return place._replace(pod=going, seen=going)
            case Send() if pod is not None and pod.uid == effect.message.uid and effect.message != place.task:
                return place._replace(task=effect.message, older=place.task)
        return place

    def _uid(self, place: Place) -> int:
        known = (place.seen.uid if place.seen else 0, place.view.uid if place.view else 0, place.record[0])
        return max(known) + 1

    def recorded(self, place: int, record: tuple[int, int], kind: Kind) -> int:
        """The place once uid and incarnation stand in the status."""
        key = (place, record, kind)
        if key not in self._recorded:
            self._recorded[key] = self.tidy(self._tables.places[place]._replace(record=record), kind)
        return self._recorded[key]

    # -- one form for what is equal
    def tidy(self, place: Place, kind: Kind) -> int:
        """The number of a place in its normal form."""
        pod, process, view = place.pod, place.process, place.view
        if pod is not None:
            ready = kind.first and process is not None and self._tables.reports[process.report].state in SERVING
            pod = pod._replace(ready=ready and not place.isolated)
        if view is not None and (place.seen is None or place.seen.uid != view.uid):
            view = None
        if kind.calm:
            place = place._replace(older=None, task=self._to_come(place))
        uids: list[int] = []
        incarnations: list[int] = []
        uid, incarnation = place.record
        return self._tables.places.id(
            Place(
                pod=pod and pod._replace(uid=number(pod.uid, uids)),
                seen=place.seen and place.seen._replace(uid=number(place.seen.uid, uids)),
                process=process and process._replace(incarnation=number(process.incarnation, incarnations)),
                view=view
                and view._replace(uid=number(view.uid, uids), incarnation=number(view.incarnation, incarnations)),
                record=(number(uid or None, uids), number(incarnation or None, incarnations)),
                task=place.task and place.task._replace(uid=number(place.task.uid, uids)),
                older=place.older and place.older._replace(uid=number(place.older.uid, uids)),
                words=place.words,
                cut=place.cut,
                lost=place.lost,
                zombies=place.zombies,
            )
        )

    def _to_come(self, place: Place) -> Message | None:
        """The task that was sent last, unless it was carried out: arriving again, it would be answered."""
        task = place.task
        return task if task is not None and (place.process is None or self._deliver(place, task) != place) else None

    def _named(self, message: Message) -> str:
        return f"{message.task} of epoch ~{message.epoch}~"

    def _told(self, report: int) -> str:
        found = self._tables.reports[report]
        return f"{found.state} in epoch ~{found.epoch}~" if found.epoch else f"{found.state}"


def vanished(place: Place) -> Place:
    """The pod is gone from the API server; on a lost node its engine lives on."""
    left = place.zombies
    if place.process is not None and place.pod is not None and place.lost >> place.pod.node & 1:
        left = tuple(sorted({*left, *place.process.engines}))
    return place._replace(pod=None, process=None, task=None, older=None, words=None, cut=False, zombies=left)
