"""One fault at most: then the states are those of each rank that it may strike, put together.

So they are explored in two processes, one for rank 0 and one for the others (which may be mirror images of each other).
"""

import logging
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState

from . import liveness
from .explore import Graph, Progress, ViolationError, explore
from .world import KINDS, World


@dataclass(frozen=True)
class Found:
    """What one exploration found."""

    text: str
    """The size of the graph and how many states of it are good; or the promise that does not hold, with its trace."""
    holds: bool
    causes: frozenset[Reason]
    """Recorded somewhere."""
    states: frozenset[RunnerState]
    """That some supervisor was in."""


def found(world: World, progress: Progress = lambda line: None) -> Found:
    """Explore a world, and check every promise."""
    what = f"ranks: {world.size}, faults: {world.faults}, budget: {world.budget}"
    if len(world.struck) < world.size:
        what += f", struck: {', '.join(f'rank {rank}' for rank in world.struck)}"
    try:
        graph = explore(world, lambda line: progress(f"{what}: {line}"))
        progress(f"{what}: safety holds in every state: {graph}; now liveness")
        good = liveness.check(graph)
    except ViolationError as violation:
        return Found(f"{what}: {violation}", False, _causes(violation.graph), _states(violation.graph))
    return Found(f"{what}: {graph}, {good} good", True, _causes(graph), _states(graph))


def one_fault(size: int, budget: int, kinds: Collection[str] = KINDS, *, told: bool = False) -> list[Found]:
    """Everything that one fault can do to a group of several ranks; in the order of the parts.

    Args:
        size: ranks, at least 2.
        budget: `spec.restartPolicy.maxRestarts`.
        kinds: of the fault.
        told: print how far it is.
    """
    parts = ((0,), tuple(range(1, size)))
    with ProcessPoolExecutor(len(parts), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_part, size, budget, tuple(kinds), part, told) for part in parts]
        return [future.result() for future in futures]


def _part(size: int, budget: int, kinds: tuple[str, ...], struck: tuple[int, ...], told: bool) -> Found:
    logging.disable(logging.CRITICAL)  # a supervisor logs each rejected task
    world = World(size, 1, budget, kinds=kinds, struck=struck)
    return found(world, _print if told else lambda line: None)


def _print(line: str) -> None:
    print(line, flush=True)


def _causes(graph: Graph) -> frozenset[Reason]:
    numbers = {state.status for state in graph.states}
    return frozenset(failure.reason for number in numbers for failure in graph.world.tables.statuses[number].history)


def _states(graph: Graph) -> frozenset[RunnerState]:
    tables = graph.world.tables
    places = [tables.places[number] for number in {place for state in graph.states for place in state.places}]
    return frozenset(tables.reports[place.process.report].state for place in places if place.process is not None)
