"""The model check that CI runs: everything that two ranks and one fault can do."""

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState

from . import liveness
from .explore import Graph, explore
from .planner import Age, Decision
from .state import State
from .world import World


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """A supervisor logs each rejected task."""
    caplog.set_level("ERROR", "mlx_runner")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("budget", [1, 0])
def test_with_two_ranks_and_one_fault_every_promise_holds_and_a_good_state_is_reached(
    budget: int, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(size=2, faults=1, budget=budget)
    graph = explore(world)
    good = liveness.check(graph)
    with capsys.disabled():
        print(f"\nmodel check, 2 ranks, 1 fault, budget {budget}: {graph}, {good} states are good")
    assert _reasons(graph) >= {
        Reason.ENGINE_CRASHED, Reason.CONTAINER_CRASHED, Reason.POD_DELETED, Reason.EVICTED, Reason.NODE_LOST,
        Reason.RUNNER_UNREACHABLE, Reason.INSUFFICIENT_MEMORY,
    }  # fmt: skip
    assert _states(graph) == set(RunnerState) - {RunnerState.RUNNING}


def _reasons(graph: Graph) -> set[Reason]:
    """The causes that were recorded somewhere."""
    numbers = {state.status for state in graph.states}
    return {failure.reason for number in numbers for failure in graph.world.tables.statuses[number].history}


def _states(graph: Graph) -> set[RunnerState]:
    """The states that some supervisor was in."""
    world = graph.world
    places = [world.tables.places[number] for number in {place for state in graph.states for place in state.places}]
    return {world.tables.reports[place.process.report].state for place in places if place.process is not None}


def test_one_rank_alone_is_checked_too() -> None:
    graph = explore(World(size=1, faults=1))
    assert liveness.check(graph) > 0


def test_mirror_images_are_merged_and_nothing_else() -> None:
    """With three ranks, the states without merging are the merged ones and their images."""
    world = World(size=3, faults=0)
    merged = set(explore(world).states)
    seen, queue = {world.start()}, [world.start()]
    for state in queue:
        fresh = {move.state for move in world.moves(state)} - seen
        seen |= fresh
        queue += sorted(fresh)
    assert {world.canonical(state)[0] for state in seen} == merged
    assert len(seen) > 1.5 * len(merged)


def test_a_plan_changes_only_at_a_time_at_which_it_asked_to_be_made_again() -> None:
    """Nothing else wakes the operator where nothing happens."""
    world = World(size=2, faults=0)
    for state in explore(world).states:
        young = _decided(world, state, Age.YOUNG)
        if young.again is not None and young.again <= Age.SHORT:
            continue
        later = _decided(world, state, Age.SHORT)
        assert (later.status, later.effects) == (young.status, young.effects), world.places(state)


def _decided(world: World, state: State, age: Age) -> Decision:
    return world.operator.decide(state.status, tuple(map(world.operator.sight, world.places(state))), age)
