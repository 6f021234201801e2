"""All moves of a state: those that go on by themselves and the faults; symmetric states are one."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from mlx_operator.decide.plan import plan
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import ENDED, RunnerState, TaskName
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import RunnerReport

from . import normal
from .forms import Forms
from .places import Kind, Places
from .planner import Age, Create, Decision, Delete, Effect, Operator, Planner, Send, Sight
from .state import BASE, Place, State, Tables
from .supervisors import Supervisors

_S = RunnerState
_TOGETHER = (_S.CONNECTING, _S.CONNECTED)
_WARM = (_S.WARMING_UP, _S.READY)


KINDS = ("engine", "container", "delete", "evict", "node", "cut", "download", "reorder", "operator", "delay")
"""The faults: of an engine, a container, a pod (deleted, evicted), a node, a network, a download, of messages that come
in another order, of the operator, and of everything at once."""
_KINDS = {(first, calm): Kind(first, calm) for first in (False, True) for calm in (False, True)}


class Move(NamedTuple):
    """One step. In the words `{0}` stands for rank 0 and so on, because a mirror image may have other numbers."""

    actor: str
    words: str
    state: State
    fault: bool = False
    broken: str | None = None
    grown: int = 0
    """By how much the epoch grew."""


class World:
    """One ModelInstance of `size` ranks with its cluster, its operator and a number of faults.

    Args:
        size: ranks.
        faults: how many may happen.
        budget: `spec.restartPolicy.maxRestarts`.
        planner: the production one, or one with a bug.
        supervisors: likewise.
        acts_first: an operator with a bug: it acts before it writes.
        kinds: of faults.
        struck: ranks that faults strike; what strikes no rank, such as the end of the operator, counts with rank 0.
    """

    def __init__(
        self,
        size: int = 2,
        faults: int = 1,
        budget: int = 1,
        *,
        planner: Planner = plan,
        supervisors: type[Supervisors] = Supervisors,
        acts_first: bool = False,
        kinds: Collection[str] = KINDS,
        struck: Collection[int] | None = None,
    ) -> None:
        self.size, self.faults, self.budget = size, faults, budget
        self.tables = Tables()
        self.operator = Operator(self.tables, size, budget, planner)
        self.supervisors = supervisors(self.tables, size)
        self._places = Places(self.tables, self.supervisors)
        self._acts_first = acts_first
        self._kinds = kinds
        self.struck = tuple(range(size) if struck is None else struck)
        self._sights: dict[int, Sight] = {}
        self._forms = Forms(self.tables, self._places, size)
        self.canonical, self.image = self._forms.canonical, self._forms.image

    def start(self) -> State:
        """A ModelInstance that was just created."""
        empty = self.tables.places.id(Place())
        return State(self.tables.statuses.id(normal.status(Status())), (empty,) * self.size, self.faults, 0)

    def places(self, state: State) -> list[Place]:
        """What stands in the table for a state."""
        return [self.tables.places[place] for place in state.places]

    # -- moves
    def moves(self, state: State) -> list[Move]:
        """All moves of a state that change it."""
        found = list(self._goes_on(state))
        quiet = all(move.actor.startswith("heal") for move in found)
        if quiet:
            found += self._time_passes(state)
        if state.faults:
            found += (move for move in self._goes_wrong(state, quiet) if move.actor in self._kinds)
        return [move for move in found if move.state != state or move.broken]

    def _goes_on(self, state: State) -> Iterator[Move]:
        for rank, place in enumerate(state.places):
            for step in self._places.steps(place, _kind(state, rank)):
                words = step.words.replace("RANK", f"{{{rank}}}")
                yield Move(f"{step.actor} {rank}", words, self._with(state, rank, step.place))
        yield from self._together(state)
        young = self._decide(state, Age.YOUNG)
        if self._changes(state, young):
            yield self._carried_out(state, young, "operator", "the operator")
        if young.again in (Age.YOUNG, Age.SHORT):
            short = self._decide(state, Age.SHORT)
            if self._changes(state, short):
                yield self._carried_out(state, short, "operator later", "seconds later the operator")

    def _time_passes(self, state: State) -> Iterator[Move]:
        """Nothing goes on: then everything that has a deadline is over at last."""
        yield from self._long(state, "operator at last", "much later the operator")
        aged = normal.long_ready(self.tables.statuses[state.status])
        if aged is not None:
            words = "the group stays Ready for longer than resetAfter"
            yield Move("time", words, state._replace(status=self.tables.statuses.id(aged)))

    def _long(self, state: State, actor: str, who: str) -> Iterator[Move]:
        again = self._decide(state, Age.YOUNG).again
        if again is Age.SHORT:
            again = self._decide(state, Age.SHORT).again
        if again is not None:
            decision = self._decide(state, Age.LONG)
            if self._changes(state, decision):
                yield self._carried_out(state, decision, actor, who)

    def _goes_wrong(self, state: State, quiet: bool) -> Iterator[Move]:
        for rank in self.struck:
            place = state.places[rank]
            for step in self._places.faults(place, _kind(state, rank)):
                words = "FAULT: " + step.words.replace("RANK", f"{{{rank}}}")
                yield Move(step.actor, words, self._less(self._with(state, rank, step.place)), fault=True)
        if 0 not in self.struck:
            return
        yield from self._operator_dies(state)
        if not quiet:
            for move in self._long(state, "delay", "FAULT: everything is late; the operator"):
                yield move._replace(state=self._less(move.state), fault=True)

    def _operator_dies(self, state: State) -> Iterator[Move]:
        restarted = self._forgetful(state)
        yield Move("operator", "FAULT: another operator takes over", restarted, fault=True)
        for age, when in ((Age.YOUNG, ""), (Age.SHORT, "seconds later ")):
            decision = self._decide(state, age)
            effects: list[Effect | None] = [None] if decision.written else []
            effects = [*decision.effects, *effects] if self._acts_first else [*effects, *decision.effects]
            for count in range(1, len(effects)):
                done = self._after(state, decision, effects[:count])
                words = f"FAULT: {when}the operator dies after this: {self._words(decision, effects[:count])}"
                grown = decision.grown if None in effects[:count] else 0
                dead = self._forgetful(done)
                yield Move("operator", words, dead, fault=True, broken=decision.broken, grown=grown)
            if decision.again not in (Age.YOUNG, Age.SHORT):
                return

    def _forgetful(self, state: State) -> State:
        """A new operator has listed all pods and heard of no supervisor yet."""
        places = []
        for rank, number in enumerate(state.places):
            place = self.tables.places[number]
            places.append(self._places.tidy(place._replace(view=None, seen=place.pod), _kind(state, rank)))
        return self._less(state._replace(places=tuple(places)))

    def _less(self, state: State) -> State:
        """One fault less to come; after the last one, nothing is late any more."""
        state = state._replace(faults=state.faults - 1)
        if state.faults:
            return state
        calm = (self._places.tidy(self.tables.places[p], _kind(state, rank)) for rank, p in enumerate(state.places))
        return state._replace(places=tuple(calm))

    # -- what the ranks do together
    def _together(self, state: State) -> Iterator[Move]:
        places = self.places(state)
        reports = [self._report(place) for place in places]
        for rank, (place, report) in enumerate(zip(places, reports, strict=True)):
            if report is None or place.process is None or report.state in ENDED or report.state is _S.SHUTTING_DOWN:
                continue
            process, others = place.process, [other for other in range(self.size) if other != rank]
            name, words = self.supervisors.running(place.process.report), ""
            if name is TaskName.CONNECT_TO_GROUP:
                if all(self._meets(places, reports, rank, other) for other in others):
                    process, words = self.supervisors.complete(process), f"{{{rank}}} is connected"
                elif self._never_meets(places, reports, rank, others):
                    process = self.supervisors.fail(process, Reason.CONNECT_TIMEOUT)
                    words = f"{{{rank}}} waits in vain for its peers"
            elif name is TaskName.START_WARMUP and all(self._warm(reports, rank, other) for other in others):
                process, words = self.supervisors.complete(process), f"{{{rank}}} is warmed up"
            if report.group == "present":
                lost = [other for other in others if not self._linked(places, reports, rank, other)]
                if lost:
                    process = self.supervisors.fail(place.process, Reason.PEER_LOST, lost[0])
                    words = f"{{{rank}}} has lost {{{lost[0]}}}"
            if process is not place.process:
                number = self._places.tidy(place._replace(process=process), _kind(state, rank))
                yield Move(f"engine {rank}", words, self._with(state, rank, number))

    def _report(self, place: Place) -> RunnerReport | None:
        return None if place.process is None else self.tables.reports[place.process.report]

    @staticmethod
    def _linked(places: Sequence[Place], reports: Sequence[RunnerReport | None], one: int, other: int) -> bool:
        """Whether the connection between two engines of a group stands."""
        mine, its = reports[one], reports[other]
        if mine is None or its is None or places[one].isolated or places[other].isolated:
            return False
        return its.epoch == mine.epoch and its.state not in ENDED

    def _meets(self, places: Sequence[Place], reports: Sequence[RunnerReport | None], one: int, other: int) -> bool:
        its = reports[other]
        if its is None or not self._linked(places, reports, one, other):
            return False
        return its.state in _TOGETHER or its.group == "present"

    def _never_meets(
        self, places: Sequence[Place], reports: Sequence[RunnerReport | None], rank: int, others: Sequence[int]
    ) -> bool:
        """Some peer has no engine of this epoch, or cannot be reached."""
        return any(not self._linked(places, reports, rank, other) for other in others)

    @staticmethod
    def _warm(reports: Sequence[RunnerReport | None], one: int, other: int) -> bool:
        mine, its = reports[one], reports[other]
        return mine is not None and its is not None and its.epoch == mine.epoch and its.state in _WARM

    # -- what the operator does
    def _decide(self, state: State, age: Age) -> Decision:
        return self.operator.decide(state.status, tuple(self._sight(place) for place in state.places), age)

    def _sight(self, place: int) -> Sight:
        known = self._sights.get(place)
        if known is None:
            known = self._sights[place] = self.operator.sight(self.tables.places[place])
        return known

    def _changes(self, state: State, decision: Decision) -> bool:
        if decision.written or decision.broken:
            return True
        return any(
            self._places.act(state.places[effect.rank], effect, _kind(state, effect.rank)) != state.places[effect.rank]
            for effect in decision.effects
        )

    def _carried_out(self, state: State, decision: Decision, actor: str, who: str) -> Move:
        effects: list[Effect | None] = [*([None] if decision.written else []), *decision.effects]
        after = self._after(state, decision, effects)
        broken = decision.broken or self._illegal(state, decision)
        grown = decision.grown if decision.written else 0
        return Move(actor, f"{who} {self._words(decision, effects)}", after, broken=broken, grown=grown)

    def _after(self, state: State, decision: Decision, effects: Sequence[Effect | None]) -> State:
        """The state once these effects were carried out (None: the write of the status)."""
        places = list(state.places)
        for effect in effects:
            if effect is not None:
                rank = effect.rank
                places[rank] = self._places.act(places[rank], effect, _kind(state, rank))
        if None not in effects:
            return state._replace(places=tuple(places))
        spent = (0 if decision.fresh_budget else state.spent) + decision.spent
        for rank, record in enumerate(decision.records):
            kind = _kind(state, rank)
            places[rank] = self._places.recorded(self._forms.shift(places[rank], decision.grown, kind), record, kind)
        return state._replace(status=decision.status, places=tuple(places), spent=spent)

    def _illegal(self, state: State, decision: Decision) -> str | None:
        """A task that even a supervisor of which everything is known would reject."""
        for effect in decision.effects:
            if isinstance(effect, Send):
                view = self._sight(state.places[effect.rank]).view
                if view is None:
                    return f"{effect.message.task} is sent to {{{effect.rank}}}, which was never heard"
                if self.supervisors.rejects(view.report, effect.message):
                    return f"{effect.message.task} is sent to {{{effect.rank}}}, which rejects it"
        return None

    def _words(self, decision: Decision, effects: Sequence[Effect | None]) -> str:
        parts = []
        for effect in effects:
            match effect:
                case None:
                    parts.append(f"writes {self._told(decision)}")
                case Create():
                    parts.append(f"creates the pod of {{{effect.rank}}}")
                case Delete():
                    parts.append(f"deletes the pod of {{{effect.rank}}}{' by force' if effect.force else ''}")
                case Send():
                    message = effect.message
                    parts.append(f"sends {message.task} of epoch ~{message.epoch}~ to {{{effect.rank}}}")
        return ", ".join(parts) or "does nothing"

    def _told(self, decision: Decision) -> str:
        status = self.tables.statuses[decision.status]
        states = ", ".join(f"{{{record.rank}}} {record.state}" for record in status.runners)
        last = f"; last failure: {status.history[0].reason}" if status.history else ""
        return f"status[epoch={self._epoch(decision)}; {states}; restarts={status.restarts}{last}]"

    @staticmethod
    def _epoch(decision: Decision) -> str:
        return f"~{BASE + decision.grown}~"

    def _with(self, state: State, rank: int, place: int) -> State:
        places = state.places
        return state._replace(places=(*places[:rank], place, *places[rank + 1 :]))


def _kind(state: State, rank: int) -> Kind:
    return _KINDS[rank == 0, state.faults == 0]
