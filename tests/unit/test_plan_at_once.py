"""A failure and a change by the user in one pass: the failure is recorded first, then the change is followed."""

from collections.abc import Callable
from typing import Any

import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.unit.scenes import condition, failures, ready, see
from tests.unit.simulator import Cluster

Change = Callable[[Cluster], None]
CHANGES: dict[str, Change] = {
    "options": lambda c: c.change(serving={"maxQueue": 1}),
    "template": lambda c: c.change(runner={"image": "runner:2"}),
    "fewer runners": lambda c: c.change(runners=1),
    "more runners": lambda c: c.change(runners=3),
    "restart": lambda c: c.annotate(names.RESTART_ANNOTATION, "1"),
    "suspend": lambda c: c.change(suspend=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_crash_in_the_pass_that_sees_a_change_is_recorded_before_the_change_is_followed(change: Change) -> None:
    cluster = ready()
    cluster.kill_engine(1)
    change(cluster)
    cluster.hear_all()
    made = cluster.reconcile()
    assert made.actions == ()
    assert made.requeue_at == cluster.now
    failure = cluster.status.history[0]
    assert (failure.epoch, failure.rank, failure.reason) == (1, 1, Reason.ENGINE_CRASHED)
    noted = cluster.status.runner(1).last_failure
    assert noted is not None
    assert noted.reason is Reason.ENGINE_CRASHED
    assert condition(cluster, ConditionType.RUNNER_FAILED).status == "True"
    assert len(failures(cluster)) == 1
    cluster.run()
    assert len(cluster.status.history) == 1
    assert cluster.ready() or cluster.pods == {}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_waits_for_the_cause_that_is_being_looked_for_and_no_longer(change: Change) -> None:
    cluster = ready()
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    change(cluster)
    cluster.hear_all()
    made = cluster.reconcile()
    assert not cluster.status.history
    assert made.requeue_at is not None
    assert 0 < (made.requeue_at - cluster.now).total_seconds() <= 2
    cluster.now = made.requeue_at
    assert see(cluster).reason is Reason.PEER_LOST
    cluster.run()
    assert cluster.ready() or cluster.pods == {}


@pytest.mark.parametrize(
    "spec", [{"deadlines": {"load": "1s"}}, {"deadlines": {"load": "1s", "unreachable": "1s"}, "serving": {}}]
)
def test_the_deadlines_of_a_new_spec_do_not_fail_the_epoch_that_it_ends(spec: dict[str, Any]) -> None:
    cluster = Cluster()
    cluster.run(until=lambda: any(s.report.state is RunnerState.LOADING for s in cluster.supervisors()))
    for supervisor in cluster.supervisors():
        supervisor.running = None
    cluster.hear_all()
    cluster.reconcile()
    cluster.wait(60)
    cluster.hear_all()
    cluster.change(**spec)
    cluster.run()
    assert not cluster.status.history
    assert cluster.ready()
    assert cluster.status.epoch == 2
