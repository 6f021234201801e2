"""The model check that CI runs: everything that one and two ranks and one fault can do."""

from collections.abc import Iterator

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.tasks import RunnerReport, TaskPhase

from . import normal, parts
from .explore import explore
from .parts import Found
from .planner import Age, Decision, Sight
from .state import State
from .world import World

CAUSES = {
    Reason.ENGINE_CRASHED, Reason.CONTAINER_CRASHED, Reason.POD_DELETED, Reason.EVICTED, Reason.NODE_LOST,
    Reason.RUNNER_UNREACHABLE, Reason.INSUFFICIENT_MEMORY,
}  # fmt: skip
"""What one fault is recorded as."""
LIMIT = 600
"""States that a form is tried on."""
BUDGETS = [pytest.param(1, id="a restart is left"), pytest.param(0, id="no restart is left")]


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """A supervisor logs each rejected task."""
    caplog.set_level("CRITICAL", "mlx_runner")


def shown(found: Found, capsys: pytest.CaptureFixture[str]) -> None:
    """Every promise was found to hold; the size of the graph is printed."""
    assert found.holds, found.text
    with capsys.disabled():
        print(f"\nmodel check, {found.text}")


@pytest.mark.parametrize("budget", BUDGETS)
def test_one_rank_and_one_fault_keep_every_promise(budget: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = parts.found(World(size=1, faults=1, budget=budget))
    shown(found, capsys)
    assert found.causes >= CAUSES
    assert found.states == set(RunnerState) - {RunnerState.RUNNING, RunnerState.CONNECTING, RunnerState.CONNECTED}


@pytest.mark.timeout(1200)
def test_two_ranks_and_one_fault_of_any_kind_keep_every_promise(capsys: pytest.CaptureFixture[str]) -> None:
    """And from everywhere a good state is reached: Ready in truth, or Stalled with a reason."""
    for found in parts.one_fault(size=2, budget=1):
        shown(found, capsys)
        assert found.causes >= CAUSES
        assert found.states == set(RunnerState) - {RunnerState.RUNNING}


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


def test_what_the_model_keeps_from_the_operator_it_would_not_look_at() -> None:
    """How tasks of an engine that ends went on, and before anything is overdue, whether heartbeats arrive."""
    world = World(size=2, faults=1, kinds=("delete", "cut"))
    graph, operator, compared = explore(world, limit=60 * LIMIT), world.operator, 0
    for state in graph.states[::23]:
        sights = tuple(map(operator.sight, world.places(state)))
        for other in _with_all_tasks(world, sights):
            for age in Age:
                compared += 1
                now = operator.decide(state.status, sights, age), operator._decide(state.status, other, age)
                assert now[0] == now[1], (age, world.places(state))
        late = tuple(sight._replace(fresh=False) for sight in sights)
        young = operator.decide(state.status, sights, Age.YOUNG), operator._decide(state.status, late, Age.YOUNG)
        assert young[0] == young[1], world.places(state)
    assert compared > LIMIT


def _with_all_tasks(world: World, sights: tuple[Sight, ...]) -> Iterator[tuple[Sight, ...]]:
    """The same with a whole report of a supervisor whose engine ends, in each of the ways there are."""
    reports, heard = world.tables.reports, world.supervisors.heard
    ended = [number for number in range(len(reports)) if heard(number) != number]
    whole = [(number, heard(number)) for number in ended]
    whole += [(reports.id(_failed(reports[number])), heard(number)) for number in ended]
    for rank, sight in enumerate(sights):
        for number, kept in whole:
            if sight.view is not None and kept == sight.view.report:
                told = sight._replace(view=sight.view._replace(report=number))
                yield (*sights[:rank], told, *sights[rank + 1 :])


def _failed(report: RunnerReport) -> RunnerReport:
    """The same report, with failed tasks in the place of completed ones."""
    tasks = (
        task.model_copy(update={"phase": TaskPhase.FAILED, "message": "words"})
        if task.phase is TaskPhase.COMPLETE and task.name is not TaskName.SHUTDOWN
        else task
        for task in report.tasks
    )
    return report.model_copy(update={"tasks": tuple(tasks)})
