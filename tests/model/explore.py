"""Breadth-first over every state: safety on the way, so the first violation found has a shortest trace."""

import gc
import itertools
import re
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from mlx_operator_api.conditions import ConditionType
from mlx_operator_api.runner import RunnerState

from . import safety
from .state import BASE, State
from .world import Move, World

Progress = Callable[[str], None]
_EVERY_SECONDS = 10.0


@dataclass
class Graph:
    """Every state that was reached, and the moves between them that are no faults."""

    world: World
    states: list[State] = field(default_factory=list)
    parents: "array[int]" = field(default_factory=lambda: array("i"))
    first: "array[int]" = field(default_factory=lambda: array("q", [0]))
    """Where the moves of each state begin in `targets`; one entry more than states."""
    targets: "array[int]" = field(default_factory=lambda: array("i"))
    actors: "array[int]" = field(default_factory=lambda: array("h"))
    """Who makes each move, as an index of `names`."""
    names: dict[str, int] = field(default_factory=dict)
    depth: int = 0
    moves: int = 0
    """With the faults."""
    seconds: float = 0.0

    def from_state(self, number: int) -> range:
        """Indices of the moves of a state in `targets` and `actors`."""
        return range(self.first[number], self.first[number + 1])

    def __str__(self) -> str:
        reached = f"{len(self.states)} states, {self.moves} moves, depth {self.depth}"
        return f"{reached}, {self.world.operator.plans} different plans, {self.seconds:.0f} s"


class ViolationError(AssertionError):
    """A promise does not hold; the message holds the shortest way to it."""

    def __init__(self, promise: str, trace: list[str], graph: Graph) -> None:
        self.promise, self.trace, self.graph = promise, trace, graph
        steps = "\n".join(f"  {number:3d}. {step}" for number, step in enumerate(trace, 1))
        super().__init__(f"{promise}\n{steps}\n  after {graph}")


def explore(world: World, progress: Progress = lambda line: None, limit: int | None = None) -> Graph:
    """Every state of a world.

    Raises:
        ViolationError: a promise of `safety` is broken.
    """
    graph = Graph(world)
    start, _ = world.canonical(world.start())
    known = {start: 0}
    graph.states.append(start)
    graph.parents.append(-1)
    gc.disable()  # nothing here is garbage, and there is ever more of it to look through
    try:
        _fill(graph, known, progress, limit)
    finally:
        gc.enable()
    return graph


def _fill(graph: Graph, known: dict[State, int], progress: Progress, limit: int | None) -> None:
    world, begun = graph.world, time.monotonic()
    told = begun
    level_end, number = 1, 0
    while number < len(graph.states) and (limit is None or number < limit):
        if number == level_end:
            graph.depth, level_end = graph.depth + 1, len(graph.states)
        moves = world.moves(graph.states[number])
        graph.moves += len(moves)
        for move in moves:
            if move.broken is not None:
                raise violation(graph, move.broken, number, move)
            target, _ = world.canonical(move.state)
            found = known.get(target)
            if found is None:
                found = known[target] = len(graph.states)
                graph.states.append(target)
                graph.parents.append(number)
                promise = safety.of_state(target, world.places(target), world.tables, world.budget)
                if promise is not None:
                    raise violation(graph, promise, found)
            if not move.fault:
                graph.targets.append(found)
                graph.actors.append(graph.names.setdefault(move.actor, len(graph.names)))
        graph.first.append(len(graph.targets))
        number += 1
        now = time.monotonic()
        graph.seconds = now - begun
        if now - told > _EVERY_SECONDS:
            told = now
            progress(f"{graph}; {len(graph.states) - number} to go, {number / graph.seconds:.0f} states/s")


def good(world: World, state: State) -> bool:
    """Ready, and the runners say so too; or Stalled with a reason."""
    status = world.tables.statuses[state.status]
    stalled, ready = status.condition(ConditionType.STALLED), status.condition(ConditionType.READY)
    if stalled is not None and stalled.status == "True":
        return True
    if ready is None or ready.status != "True":
        return False
    for place in world.places(state):
        if place.process is None or place.isolated or place.record[0] != (place.pod.uid if place.pod else 0):
            return False
        report = world.tables.reports[place.process.report]
        if report.epoch != BASE or report.state is not RunnerState.READY or report.draining:
            return False
    return True


class Naming(NamedTuple):
    """What ranks and epochs are really called at one point of a trace: in states they are relative."""

    ranks: tuple[int, ...]
    epoch: int

    def say(self, words: str) -> str:
        """Words for a person."""
        named = words.format(*(f"rank {rank}" for rank in self.ranks))
        return re.sub(r"~(\d+)~", lambda found: str(int(found[1]) - BASE + self.epoch), named)

    def after(self, move: Move, order: tuple[int, ...]) -> "Naming":
        """The same after a move."""
        return Naming(tuple(self.ranks[rank] for rank in order), self.epoch + move.grown)


def way(graph: Graph, number: int) -> list[int]:
    """The states from the beginning to this one, by the shortest way."""
    states = [number]
    while graph.parents[states[-1]] >= 0:
        states.append(graph.parents[states[-1]])
    return states[::-1]


def follow(graph: Graph, states: list[int]) -> tuple[list[str], Naming]:
    """The words of the steps along states that follow each other from the beginning, and what is called how then."""
    world, words = graph.world, []
    naming = Naming(world.canonical(world.start())[1], BASE)
    for here, there in itertools.pairwise(states):
        for move in world.moves(graph.states[here]):
            target, order = world.canonical(move.state)
            if target == graph.states[there]:
                words.append(naming.say(move.words))
                naming = naming.after(move, order)
                break
        else:
            raise AssertionError(f"no move from state {here} to state {there}")
    return words, naming


def violation(graph: Graph, promise: str, number: int, last: Move | None = None) -> ViolationError:
    """A promise that is broken in a state, or by a last move from it."""
    words, naming = follow(graph, way(graph, number))
    if last is not None:
        words.append(naming.say(last.words))
    return ViolationError(naming.say(promise), words, graph)
