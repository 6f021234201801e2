"""The model check that CI runs: everything that one and two ranks and one fault can do."""

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState

from . import liveness, normal
from .explore import Graph, explore
from .planner import Age, Decision
from .state import State
from .world import World

CAUSES = {
    Reason.ENGINE_CRASHED, Reason.CONTAINER_CRASHED, Reason.POD_DELETED, Reason.EVICTED, Reason.NODE_LOST,
    Reason.RUNNER_UNREACHABLE, Reason.INSUFFICIENT_MEMORY,
}  # fmt: skip
"""What one fault is recorded as."""
SMALL = ("engine", "download", "reorder", "operator")
LIMIT = 600
"""States that a form is tried on."""
BUDGETS = [pytest.param(1, id="a restart is left"), pytest.param(0, id="no restart is left")]


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """A supervisor logs each rejected task."""
    caplog.set_level("CRITICAL", "mlx_runner")


def checked(world: World, capsys: pytest.CaptureFixture[str]) -> Graph:
    """The graph, once every promise was found to hold in it; its size is printed."""
    graph = explore(world)
    good = liveness.check(graph)
    with capsys.disabled():
        print(
            f"\nmodel check, ranks: {world.size}, faults: {world.faults}, budget: {world.budget}: {graph}, {good} good"
        )
    return graph


@pytest.mark.parametrize("budget", BUDGETS)
def test_one_rank_and_one_fault_keep_every_promise(budget: int, capsys: pytest.CaptureFixture[str]) -> None:
    graph = checked(World(size=1, faults=1, budget=budget), capsys)
    assert _causes(graph) >= CAUSES
    assert _states(graph) == set(RunnerState) - {RunnerState.RUNNING, RunnerState.CONNECTING, RunnerState.CONNECTED}


@pytest.mark.timeout(900)
def test_two_ranks_and_one_fault_keep_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    """And from everywhere a good state is reached: Ready in truth, or Stalled with a reason.

    The other faults have many times as many states: `make model-check` has the time.
    """
    graph = checked(World(size=2, faults=1, budget=1, kinds=SMALL), capsys)
    assert _causes(graph) >= {Reason.ENGINE_CRASHED, Reason.INSUFFICIENT_MEMORY}
    assert _states(graph) >= set(RunnerState) - {RunnerState.RUNNING, RunnerState.SHUTTING_DOWN, RunnerState.SHUTDOWN}


def _causes(graph: Graph) -> set[Reason]:
    """The causes that were recorded somewhere."""
    numbers = {state.status for state in graph.states}
    return {failure.reason for number in numbers for failure in graph.world.tables.statuses[number].history}


def _states(graph: Graph) -> set[RunnerState]:
    """The states that some supervisor was in."""
    world = graph.world
    places = [world.tables.places[number] for number in {place for state in graph.states for place in state.places}]
    return {world.tables.reports[place.process.report].state for place in places if place.process is not None}


def test_mirror_images_are_merged_and_nothing_else() -> None:
    """Without merging there are the same states, and their images."""
    world = World(size=3, faults=0)
    merged = set(explore(world, limit=LIMIT).states[:LIMIT])
    for state in merged:
        image = world.image(state, (0, 2, 1))
        assert world.image(image, (0, 2, 1)) == state
        assert world.canonical(image)[0] == world.canonical(state)[0] == state
        mine = {world.canonical(move.state)[0] for move in world.moves(state)}
        assert mine == {world.canonical(move.state)[0] for move in world.moves(image)}


def test_normal_forms_are_normal() -> None:
    world = World(size=2, faults=1)
    explore(world, limit=LIMIT)
    for number in range(len(world.tables.statuses)):
        status = world.tables.statuses[number]
        assert normal.status(status) == status
    for number in range(len(world.tables.reports)):
        report = world.tables.reports[number]
        assert normal.report(report) == report


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
