"""The supervisor's state machine: every task in every state, and the order of everything it publishes."""

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import ENDED, ORDER, TRANSITIONS, RunnerState, TaskName, judge
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import (
    ConnectToGroup,
    CreateRunner,
    DownloadModel,
    LoadModel,
    ModelFacts,
    Peer,
    Predecessor,
    RunnerReport,
    Shutdown,
    StartWarmup,
    Task,
    TaskOutcome,
    TaskPhase,
    TaskRequest,
)
from mlx_runner.supervisor.machine import Machine

UID = "0b5d"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
OPERATOR_TASKS = [
    TaskName.CREATE_RUNNER,
    TaskName.DOWNLOAD_MODEL,
    TaskName.CONNECT_TO_GROUP,
    TaskName.LOAD_MODEL,
    TaskName.START_WARMUP,
    TaskName.SHUTDOWN,
]


def task(name: TaskName, world_size: int = 2) -> Task:
    match name:
        case TaskName.CREATE_RUNNER:
            return CreateRunner(world_size=world_size, source="pvc://models/tiny", served_name="tiny")
        case TaskName.CONNECT_TO_GROUP:
            return ConnectToGroup(peers=tuple(Peer(rank=r, pod_ip=f"10.0.0.{r}", port=8082) for r in range(world_size)))
        case TaskName.DOWNLOAD_MODEL:
            return DownloadModel()
        case TaskName.LOAD_MODEL:
            return LoadModel()
        case TaskName.START_WARMUP:
            return StartWarmup()
        case _:
            return Shutdown()


def request(name: TaskName, epoch: int = 1, *, attempt: int = 1, world_size: int = 2) -> TaskRequest:
    return TaskRequest(instance_uid=UID, epoch=epoch, rank=0, attempt=attempt, task=task(name, world_size))


def failure(epoch: int, state: RunnerState, reason: Reason = Reason.ENGINE_CRASHED) -> LastFailure:
    return LastFailure(
        epoch=epoch,
        time=NOW,
        state=state,
        reason=reason,
        message=f"engine killed by signal 9 (SIGKILL) in {state}",
        signal="SIGKILL",
        diagnostics=("RuntimeError: it broke", "the end"),
    )


def machine_in(state: RunnerState, world_size: int = 2) -> Machine:
    """A machine that went the ordinary way to a state."""
    machine = Machine(UID, 0, now=lambda: NOW)
    if state is RunnerState.PENDING:
        return machine

    def settle(name: TaskName, **facts: object) -> None:
        machine.complete(1, name, **facts)

    machine.offer(request(TaskName.CREATE_RUNNER, world_size=world_size))
    settle(TaskName.CREATE_RUNNER)
    machine.offer(request(TaskName.DOWNLOAD_MODEL))
    settle(TaskName.DOWNLOAD_MODEL, model_available=True)
    way: list[tuple[RunnerState, Callable[[], object]]] = [
        (RunnerState.CONNECTING, lambda: machine.offer(request(TaskName.CONNECT_TO_GROUP, world_size=world_size))),
        (RunnerState.CONNECTED, lambda: settle(TaskName.CONNECT_TO_GROUP, group="present")),
        (RunnerState.LOADING, lambda: machine.offer(request(TaskName.LOAD_MODEL))),
        (RunnerState.LOADED, lambda: settle(TaskName.LOAD_MODEL)),
        (RunnerState.WARMING_UP, lambda: machine.offer(request(TaskName.START_WARMUP))),
        (RunnerState.READY, lambda: settle(TaskName.START_WARMUP)),
        (RunnerState.RUNNING, lambda: machine.requests(1)),
        (RunnerState.SHUTTING_DOWN, lambda: machine.offer(request(TaskName.SHUTDOWN))),
        (RunnerState.SHUTDOWN, lambda: machine.ended(1)),
    ]
    if state is RunnerState.FAILED:
        machine.fail(1, failure(1, machine.state))
    for reached, step in way:
        if machine.state is state:
            break
        if world_size == 1 and reached in {RunnerState.CONNECTING, RunnerState.CONNECTED}:
            continue
        step()
    assert machine.state is state
    return machine


def states(world_size: int) -> list[RunnerState]:
    alone = {RunnerState.CONNECTING, RunnerState.CONNECTED}
    return [s for s in RunnerState if world_size > 1 or s not in alone]


@pytest.mark.parametrize("name", OPERATOR_TASKS)
@pytest.mark.parametrize(("world_size", "state"), [(n, s) for n in (1, 2) for s in states(n)])
@pytest.mark.parametrize("epoch", [1, 2])
def test_every_task_in_every_state_is_decided_as_the_table_says(
    name: TaskName, world_size: int, state: RunnerState, epoch: int
) -> None:
    machine = machine_in(state, world_size)
    before = machine.report
    known = next((t for t in before.tasks if t.name is name), None) if epoch == before.epoch else None
    objection = judge(name, epoch, machine.standing)

    offer = machine.offer(request(name, epoch, world_size=world_size))

    if known is not None:
        assert (offer.outcome, offer.run) == (known, False)
        assert machine.report == before
    elif objection is not None:
        assert offer.outcome.phase is TaskPhase.REJECTED
        assert offer.outcome.rejection == objection
        assert not offer.run
        assert machine.state is state
        assert offer.outcome in machine.report.tasks
    elif name is TaskName.CREATE_RUNNER:
        assert offer.run
        assert (machine.epoch, machine.state) == (epoch, RunnerState.PENDING)
    elif name is TaskName.SHUTDOWN and state in ENDED:
        assert (offer.run, machine.state, offer.outcome.phase) == (False, state, TaskPhase.COMPLETE)
    else:
        assert offer.run
        assert machine.state is (TRANSITIONS[name].via or state)
        assert offer.outcome.phase is TaskPhase.RUNNING


def test_load_is_accepted_in_connected_whatever_the_engine_says_of_its_group(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    machine = machine_in(RunnerState.CONNECTED)
    machine.note(group="absent")  # an engine that returned no handle

    assert machine.offer(request(TaskName.LOAD_MODEL)).run
    assert "LoadModel accepted: state=RunnerConnected world_size=2 rank=0 epoch=1 group=absent" in caplog.messages


def test_load_in_idle_is_rejected_with_every_field_and_then_the_right_order_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = machine_in(RunnerState.IDLE)

    rejection = machine.offer(request(TaskName.LOAD_MODEL)).outcome.rejection

    assert rejection is not None
    assert rejection.model_dump(by_alias=True, mode="json") == {
        "task": "LoadModel",
        "why": "not in RunnerIdle with world_size 2",
        "state": "RunnerIdle",
        "taskEpoch": 1,
        "epoch": 1,
        "worldSize": 2,
        "rank": 0,
        "group": "absent",
        "acceptedIn": ["RunnerConnected"],
        "tasksAccepted": ["CreateRunner", "DownloadModel", "ConnectToGroup", "Shutdown"],
    }
    assert caplog.messages == [rejection.line()]
    assert "accepted_in=[RunnerConnected]" in rejection.line()
    assert machine.offer(request(TaskName.CONNECT_TO_GROUP)).run
    machine.complete(1, TaskName.CONNECT_TO_GROUP)
    # The same identity again: a rejection is no run, so now it runs.
    assert machine.offer(request(TaskName.LOAD_MODEL)).run
    assert [t.phase for t in machine.report.tasks if t.name is TaskName.LOAD_MODEL] == [TaskPhase.RUNNING]


def test_a_shutdown_of_a_failed_runner_keeps_its_failure() -> None:
    machine = machine_in(RunnerState.FAILED)
    offer = machine.offer(request(TaskName.SHUTDOWN))
    assert offer.outcome.phase is TaskPhase.COMPLETE
    assert machine.state is RunnerState.FAILED
    assert machine.report.failure is not None


def test_a_download_is_tried_again_only_with_a_higher_attempt() -> None:
    machine = machine_in(RunnerState.IDLE)
    machine.offer(request(TaskName.CREATE_RUNNER, 2))
    machine.complete(2, TaskName.CREATE_RUNNER)
    assert machine.offer(request(TaskName.DOWNLOAD_MODEL, 2)).run
    machine.fail_task(2, TaskName.DOWNLOAD_MODEL, reason=Reason.MODEL_NOT_FOUND, message="not there")

    again = machine.offer(request(TaskName.DOWNLOAD_MODEL, 2))
    assert (again.run, again.outcome.phase, again.outcome.message) == (False, TaskPhase.FAILED, "not there")
    assert machine.offer(request(TaskName.DOWNLOAD_MODEL, 2, attempt=2)).run
    assert not machine.offer(request(TaskName.DOWNLOAD_MODEL, 2, attempt=3)).run, "one at a time"
    assert machine.state is RunnerState.IDLE


def test_only_the_first_failure_of_an_epoch_counts_and_what_was_under_way_failed_with_it() -> None:
    machine = machine_in(RunnerState.LOADING)
    assert machine.fail(1, failure(1, RunnerState.LOADING, Reason.LOAD_FAILED))
    assert not machine.fail(1, failure(1, RunnerState.FAILED))
    report = machine.report
    assert report.failure is not None
    assert report.failure.reason is Reason.LOAD_FAILED
    load = next(t for t in report.tasks if t.name is TaskName.LOAD_MODEL)
    assert (load.phase, load.reason) == (TaskPhase.FAILED, Reason.LOAD_FAILED)


def test_words_of_an_older_epoch_change_nothing() -> None:
    machine = machine_in(RunnerState.LOADING)
    machine.offer(request(TaskName.CREATE_RUNNER, 2))
    before = machine.report
    assert not machine.complete(1, TaskName.LOAD_MODEL)
    assert not machine.fail(1, failure(1, RunnerState.LOADING))
    assert not machine.fail_task(1, TaskName.DOWNLOAD_MODEL)
    machine.ended(1)
    machine.shut_down(1)
    assert machine.report == before


def test_requests_make_ready_running_and_back_without_a_report_for_each() -> None:
    machine = machine_in(RunnerState.READY)
    published: list[RunnerReport] = []
    machine.subscribe(published.append)
    for active in (1, 2, 3, 1, 0):
        machine.requests(active)
    assert [(r.state, r.active_requests) for r in published] == [(RunnerState.RUNNING, 1), (RunnerState.READY, 0)]


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("state", list(RunnerState))
def test_a_full_report_of_any_failure_survives_json(reason: Reason, state: RunnerState) -> None:
    rejection = judge(TaskName.START_WARMUP, 1, machine_in(RunnerState.LOADING).standing)
    broken = failure(7, state, reason).model_copy(update={"diagnostics": tuple(f"line {i} é\x1b[0m" for i in range(8))})
    full = RunnerReport(
        instance_uid=UID,
        rank=1,
        incarnation="2026-01-02T03:04:05.000001Z",
        seq=9,
        epoch=7,
        world_size=2,
        state=RunnerState.FAILED,
        since=NOW,
        group="present",
        tasks=(
            TaskOutcome(name=TaskName.LOAD_MODEL, epoch=7, phase=TaskPhase.FAILED, reason=reason, message="x"),
            TaskOutcome(name=TaskName.START_WARMUP, epoch=7, phase=TaskPhase.REJECTED, rejection=rejection),
        ),
        model_available=True,
        model=ModelFacts(revision="main", digest="sha256:0", bytes=1, architecture="qwen2", layers=4),
        download_percent=100,
        layers="0-1",
        layers_loaded=1,
        layers_total=2,
        waiting_for=(0,),
        ring_listening=True,
        active_requests=3,
        steps=12,
        failure=broken,
        peer=0,
        predecessor=Predecessor(incarnation="i", epoch=6, state=state, last_report=NOW, failure=broken),
        memory_limit_bytes=512 * 1024**2,
        draining=True,
    )
    wire = full.model_dump_json(by_alias=True, exclude_none=True)
    assert RunnerReport.model_validate_json(wire) == full


KINDS = ["complete", "fail", "fail_task", "requests", "ended", "term"]
NEXT = {
    RunnerState.PENDING: TaskName.CREATE_RUNNER,
    RunnerState.IDLE: TaskName.CONNECT_TO_GROUP,
    RunnerState.CONNECTED: TaskName.LOAD_MODEL,
    RunnerState.LOADED: TaskName.START_WARMUP,
    RunnerState.READY: TaskName.SHUTDOWN,
}
Step = tuple[str, TaskName, int, int]
STEPS = st.tuples(
    st.sampled_from([*["advance"] * 8, *["offer"] * 3, *KINDS]),
    st.sampled_from(OPERATOR_TASKS),
    st.integers(-1, 1),
    st.integers(1, 2),
)


def advance(machine: Machine, world_size: int) -> TaskRequest | None:
    """The ordinary next step: complete what runs, else the next task, so that random play gets to every state."""
    epoch = machine.epoch
    under_way = [t.name for t in machine.report.tasks if t.phase is TaskPhase.RUNNING]
    if TaskName.SHUTDOWN in under_way:
        machine.ended(epoch)
    elif under_way:
        facts = {"model_available": True} if under_way[0] is TaskName.DOWNLOAD_MODEL else {}
        machine.complete(epoch, under_way[0], **facts)
    elif machine.state is RunnerState.IDLE and not machine.report.model_available:
        return request(TaskName.DOWNLOAD_MODEL, epoch)
    elif machine.state is RunnerState.IDLE and world_size == 1:
        return request(TaskName.LOAD_MODEL, epoch)
    elif machine.state in NEXT:
        return request(NEXT[machine.state], max(1, epoch), world_size=world_size)
    return None


def play(machine: Machine, steps: list[Step], world_size: int) -> list[tuple[TaskName, int, int]]:
    """Do anything in any order; what was run, by identity."""
    runs: list[tuple[TaskName, int, int]] = []
    for kind, name, shift, number in steps:
        epoch = max(1, machine.epoch + shift)
        match kind:
            case "advance":
                step = advance(machine, world_size)
                if step is not None and machine.offer(step).run:
                    runs.append((step.task.name, step.epoch, step.attempt))
            case "offer":
                if machine.offer(request(name, epoch, attempt=number, world_size=world_size)).run:
                    runs.append((name, epoch, number))
            case "complete" if name is TaskName.SHUTDOWN:
                machine.ended(epoch)
            case "complete":
                facts = {"model_available": True} if name is TaskName.DOWNLOAD_MODEL else {}
                machine.complete(epoch, name, **facts)
            case "fail":
                machine.fail(epoch, failure(epoch, machine.state))
            case "fail_task":
                machine.fail_task(epoch, TaskName.DOWNLOAD_MODEL, message="no")
            case "requests":
                machine.requests(number - 1)
            case "ended":
                machine.ended(epoch)
            case "term":
                machine.shut_down(epoch)
    return runs


@settings(max_examples=400, deadline=None)
@given(steps=st.lists(STEPS, max_size=60), world_size=st.sampled_from([1, 2]))
def test_whatever_happens_reports_are_in_order_and_nothing_runs_twice(steps: list[Step], world_size: int) -> None:
    machine = Machine(UID, 0, now=lambda: NOW)
    reports = [machine.report]
    machine.subscribe(reports.append)

    runs = play(machine, steps, world_size)

    assert len(runs) == len(set(runs))
    for before, after in pairwise(reports):
        assert after.seq > before.seq
        assert after.epoch >= before.epoch
        if after.epoch == before.epoch and after.state is not before.state:
            back = (before.state, after.state) == (RunnerState.RUNNING, RunnerState.READY)
            assert back or ORDER[after.state] > ORDER[before.state]
        RunnerReport.model_validate_json(after.model_dump_json(by_alias=True))
        assert_order(before, after)


def assert_order(before: RunnerReport, after: RunnerReport) -> None:
    """Transient state, then the acknowledgement; the completion, then the settled state: never both in one report."""
    if before.epoch != after.epoch:
        assert after.tasks == ()
        return
    old = {(t.name, t.epoch, t.attempt): t.phase for t in before.tasks}
    news = [t for t in after.tasks if old.get((t.name, t.epoch, t.attempt)) is not t.phase]
    for outcome in news:
        if outcome.phase in {TaskPhase.RUNNING, TaskPhase.COMPLETE}:
            assert after.state is before.state, "an outcome never comes together with a state"
        via = TRANSITIONS[outcome.name].via
        if outcome.phase is TaskPhase.RUNNING and via is not None:
            assert after.state is via
    for name, row in TRANSITIONS.items():
        settled = after.state is row.to and after.state is not before.state
        if settled and row.to is not None and name in {TaskName.CONNECT_TO_GROUP, TaskName.LOAD_MODEL}:
            assert any(t.name is name and t.phase is TaskPhase.COMPLETE for t in before.tasks)


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(STEPS, max_size=40), name=st.sampled_from(OPERATOR_TASKS), again=st.integers(2, 4))
def test_a_task_sent_again_is_answered_and_changes_nothing(steps: list[Step], name: TaskName, again: int) -> None:
    machine = Machine(UID, 0, now=lambda: NOW)
    play(machine, steps, 2)
    epoch = max(1, machine.epoch)
    first = machine.offer(request(name, epoch))
    state, epoch_now = machine.state, machine.epoch
    for _ in range(again):
        repeated = machine.offer(request(name, epoch))
        assert not repeated.run
        assert (machine.state, machine.epoch) == (state, epoch_now)
        assert repeated.outcome.phase is first.outcome.phase
