"""What is worth a write: what decides something at once, what only informs when it stays for longer than a moment."""

from mlx_operator.decide.actions import SendTask
from mlx_operator.decide.writes import MOVING_SECONDS, QUIET_SECONDS
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import ORDER, RunnerState
from tests.unit.scenes import condition
from tests.unit.simulator import Cluster


def loading() -> Cluster:
    """Both engines load, and go on doing so."""
    cluster = Cluster()
    cluster.run(until=lambda: states(cluster) == {RunnerState.LOADING})
    for rank in (0, 1):
        cluster.supervisor(rank).running = None
    return cluster


def states(cluster: Cluster) -> set[RunnerState]:
    supervisors = [pod.supervisor for pod in cluster.pods.values()]
    return {s.report.state for s in supervisors if s is not None} if all(supervisors) and supervisors else set()


def test_a_way_to_ready_that_takes_a_moment_is_written_in_three_steps() -> None:
    cluster = Cluster()
    cluster.run()
    assert cluster.ready()
    told = [patch.condition(ConditionType.READY) for patch in cluster.patches]
    assert [ready.reason for ready in told if ready is not None] == [
        Reason.WAITING_FOR_PODS, Reason.EPOCH_STARTED, Reason.READY,
    ]  # fmt: skip
    for kind in (ConditionType.SCHEDULED, ConditionType.MODEL_AVAILABLE, ConditionType.CONNECTED, ConditionType.LOADED):
        assert condition(cluster, kind).status == "True"
    assert {record.state for record in cluster.status.runners} == {RunnerState.READY}


def test_each_epoch_tells_the_same_events_however_many_writes_it_takes() -> None:
    quick, slow = Cluster(), loading()
    quick.run()
    slow.run(QUIET_SECONDS * 3, until=lambda: False)
    for rank in (0, 1):
        slow.supervisor(rank).publish(state=RunnerState.LOADED, layers="0-1", since=slow.now)
    slow.run()
    assert slow.ready()
    assert len(slow.patches) > len(quick.patches)
    expected = [Reason.PODS_CREATED, Reason.EPOCH_STARTED, Reason.MODEL_LOADED, Reason.READY]
    assert [event.reason for event in quick.events] == [event.reason for event in slow.events] == expected


def test_a_step_that_lasts_is_written_once_nothing_was_written_for_a_while() -> None:
    cluster = loading()
    patches = len(cluster.patches)
    made = cluster.reconcile()
    assert len(cluster.patches) == patches
    assert condition(cluster, ConditionType.CONNECTED).status == "False"
    assert made.requeue_at is not None
    assert (made.requeue_at - cluster.now).total_seconds() <= QUIET_SECONDS
    cluster.wait(QUIET_SECONDS + 1)
    cluster.hear_all()
    cluster.reconcile()
    assert len(cluster.patches) == patches + 1
    assert condition(cluster, ConditionType.CONNECTED).status == "True"
    assert {record.state for record in cluster.status.runners} == {RunnerState.LOADING}


def test_a_step_that_a_task_leads_on_from_is_not_written_unless_the_task_gets_nowhere() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: states(cluster) == {RunnerState.CONNECTING})
    cluster.tick()
    assert states(cluster) == {RunnerState.CONNECTED}
    patches = len(cluster.patches)
    cluster.wait(QUIET_SECONDS + 1)
    cluster.hear_all()
    made = cluster.reconcile(act=False)
    assert [action.request.task.name for action in made.actions if isinstance(action, SendTask)] == ["LoadModel"] * 2
    assert len(cluster.patches) == patches
    cluster.wait(MOVING_SECONDS)
    cluster.hear_all()
    cluster.reconcile(act=False)
    assert len(cluster.patches) == patches + 1
    assert condition(cluster, ConditionType.CONNECTED).status == "True"


def test_a_failure_is_written_at_once_with_all_that_had_waited() -> None:
    cluster = loading()
    patches = len(cluster.patches)
    cluster.supervisor(1).fail(Reason.LOAD_FAILED, "it broke")
    cluster.hear_all()
    made = cluster.reconcile()
    assert len(cluster.patches) == patches + 1
    assert cluster.status.history[0].reason is Reason.LOAD_FAILED
    assert condition(cluster, ConditionType.MODEL_AVAILABLE).status == "True"
    assert cluster.status.runner(0).state is RunnerState.LOADING
    assert [event.reason for event in made.events] == [Reason.RUNNER_FAILED]


def test_a_group_that_is_not_ready_any_more_is_told_at_once() -> None:
    cluster = Cluster()
    cluster.run()
    patches = len(cluster.patches)
    status = cluster.pods["tiny-0"].manifest["status"]
    status["conditions"] = [entry for entry in status["conditions"] if entry["type"] != "Ready"]
    cluster.reconcile()
    assert len(cluster.patches) == patches + 1
    assert condition(cluster, ConditionType.READY).reason is Reason.WAITING_FOR_ENDPOINT


def test_trouble_with_a_step_is_told_at_once() -> None:
    cluster = Cluster()
    cluster.pull_error = "no such image"
    cluster.reconcile()
    patches = len(cluster.patches)
    cluster.tick()
    cluster.tick()
    cluster.reconcile()
    assert len(cluster.patches) == patches + 1
    assert condition(cluster, ConditionType.SCHEDULED).reason is Reason.IMAGE_PULL_FAILED


def test_a_state_that_was_skipped_in_status_is_never_gone_back_to() -> None:
    cluster = loading()
    cluster.wait(QUIET_SECONDS + 1)
    cluster.hear_all()
    cluster.reconcile()
    stored = {record.rank: ORDER[record.state] for record in cluster.status.runners}
    cluster.restart_operator()
    cluster.reconcile()
    assert {record.rank: ORDER[record.state] for record in cluster.status.runners} == stored
