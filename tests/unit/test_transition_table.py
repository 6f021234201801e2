"""The one transition table: every state, every task, every world size."""

import pytest

from mlx_operator_api.runner import (
    ORDER,
    TRANSITIONS,
    RunnerState,
    Standing,
    TaskName,
    TaskRejected,
    accepted_in,
    judge,
    tasks_accepted,
)

S, T = RunnerState, TaskName
EVERY_STATE = set(S)
# Written a second time here on purpose: this is the table of the design document.
GROUP = {
    T.CREATE_RUNNER: EVERY_STATE,
    T.DOWNLOAD_MODEL: {S.IDLE},
    T.CONNECT_TO_GROUP: {S.IDLE},
    T.LOAD_MODEL: {S.CONNECTED},
    T.START_WARMUP: {S.LOADED},
    T.TEXT_GENERATION: {S.READY, S.RUNNING},
    T.CANCEL_TASK: {S.RUNNING},
    T.SHUTDOWN: EVERY_STATE - {S.PENDING},
}
SINGLE = {**GROUP, T.CONNECT_TO_GROUP: set(), T.LOAD_MODEL: {S.IDLE}}


def standing(
    state: RunnerState, world_size: int, *, epoch: int = 3, model: bool = True, group: str = "absent"
) -> Standing:
    return Standing(state=state, epoch=epoch, world_size=world_size, rank=0, group=group, model_available=model)


def rejected(task: TaskName, epoch: int, found: Standing) -> TaskRejected:
    rejection = judge(task, epoch, found)
    assert rejection is not None
    return rejection


@pytest.mark.parametrize("world_size", [1, 2, 64])
@pytest.mark.parametrize("task", list(T))
@pytest.mark.parametrize("state", list(S))
def test_every_task_is_accepted_in_exactly_the_states_of_the_table(
    state: RunnerState, task: TaskName, world_size: int
) -> None:
    table = GROUP if world_size > 1 else SINGLE
    epoch = 4 if task is T.CREATE_RUNNER else 3
    accepted = judge(task, epoch, standing(state, world_size)) is None
    assert accepted == (state in table[task])
    assert accepted_in(task, world_size) == table[task]
    assert (task in tasks_accepted(state, world_size)) == (state in table[task])


@pytest.mark.parametrize("group", ["present", "absent"])
def test_load_model_in_connected_never_asks_for_a_handle_of_the_group(group: str) -> None:
    assert judge(T.LOAD_MODEL, 3, standing(S.CONNECTED, 2, group=group)) is None


def test_load_model_in_idle_of_a_group_is_rejected_with_everything_a_person_needs() -> None:
    rejection = rejected(T.LOAD_MODEL, 3, standing(S.IDLE, 2))
    assert rejection.state is S.IDLE
    assert rejection.accepted_in == (S.CONNECTED,)
    assert set(rejection.tasks_accepted) == {T.CREATE_RUNNER, T.DOWNLOAD_MODEL, T.CONNECT_TO_GROUP, T.SHUTDOWN}
    assert rejection.line() == (
        "LoadModel rejected: not in RunnerIdle with world_size 2: state=RunnerIdle world_size=2 rank=0 epoch=3 "
        "task_epoch=3 group=absent accepted_in=[RunnerConnected]"
    )


def test_load_model_without_the_model_is_rejected_and_says_what_comes_first() -> None:
    assert "DownloadModel" in rejected(T.LOAD_MODEL, 3, standing(S.CONNECTED, 2, model=False)).why


@pytest.mark.parametrize("task", [task for task in T if task is not T.CREATE_RUNNER])
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_task_of_another_epoch_is_rejected_in_every_state(task: TaskName, epoch: int) -> None:
    for state in S:
        assert f"epoch {epoch}" in rejected(task, epoch, standing(state, 2)).why


@pytest.mark.parametrize("state", list(S))
def test_create_runner_needs_a_newer_epoch_in_every_state(state: RunnerState) -> None:
    assert judge(T.CREATE_RUNNER, 4, standing(state, 2)) is None
    for epoch in (1, 2, 3):
        assert "already of epoch 3" in rejected(T.CREATE_RUNNER, epoch, standing(state, 2)).why


@pytest.mark.parametrize("task", [task for task in T if task is not T.CREATE_RUNNER])
def test_before_the_first_runner_only_create_runner_is_accepted(task: TaskName) -> None:
    assert "CreateRunner" in rejected(task, 1, Standing()).why
    assert judge(T.CREATE_RUNNER, 1, Standing()) is None


def test_no_transition_leads_backwards() -> None:
    for task, row in TRANSITIONS.items():
        if task is T.CREATE_RUNNER:
            continue
        for state in row.group | row.single:
            for target in (row.via, row.to):
                assert target is None or ORDER[target] >= ORDER[state] or state in (S.SHUTDOWN, S.FAILED)


def test_a_rejection_survives_the_wire() -> None:
    rejection = rejected(T.START_WARMUP, 3, standing(S.LOADING, 2))
    assert TaskRejected.model_validate_json(rejection.model_dump_json(by_alias=True)) == rejection
