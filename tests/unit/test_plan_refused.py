"""A spec that cannot be used, on a group that runs: what becomes of the group is told, and suspend is obeyed."""

from typing import Any

import pytest

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.unit.scenes import condition, failures, ready

GOOD = {"model": {"source": "pvc://models/tiny"}, "runners": 2}
REFUSED: dict[str, tuple[dict[str, Any], Reason]] = {
    "scheme": ({"model": {"source": "s3://bucket/model"}}, Reason.INVALID_SPEC),
    "adapter": (
        {"model": {"source": "pvc://models/tiny", "adapter": {"source": "s3://a/b"}}},
        Reason.INVALID_SPEC,
    ),
    "runners": ({"runners": 65}, Reason.INVALID_SPEC),
    "scheme and size": ({"model": {"source": "s3://bucket/model"}, "runners": 1}, Reason.INVALID_SPEC),
}
table = pytest.mark.parametrize(("spec", "reason"), REFUSED.values(), ids=REFUSED)


@table
def test_a_crash_of_a_group_whose_spec_is_refused_is_recorded_though_nothing_starts_again(
    spec: dict[str, Any], reason: Reason
) -> None:
    cluster = ready()
    cluster.change(**spec)
    cluster.reconcile()
    assert cluster.status.runners_ready == "2/2"
    cluster.kill_engine(1)
    cluster.run()
    status = cluster.status
    assert [(f.epoch, f.rank, f.reason) for f in status.history] == [(1, 1, Reason.ENGINE_CRASHED)]
    assert status.runner(1).state is RunnerState.FAILED
    assert (status.ready_runners, status.runners_ready, status.next_restart_at) == (0, "0/2", None)
    failed = condition(cluster, ConditionType.RUNNER_FAILED)
    assert (failed.status, failed.reason) == ("True", Reason.ENGINE_CRASHED)
    assert failed.message == (
        "rank 1/2 pod tiny-1 on node n2: engine killed by signal 9 (SIGKILL) in RunnerReady; no restart before the "
        "spec is corrected; read the evidence in the message and the log: kubectl logs tiny-1"
    )
    assert condition(cluster, ConditionType.READY).reason is reason
    assert condition(cluster, ConditionType.CONNECTED).status == "False"
    assert len(failures(cluster)) == 1
    assert [r.epoch for r in status.runners] == [1, 1], "nothing starts from a refused spec"
    assert status.brief[0] == f"Stalled: {reason} after EngineCrashed on rank 1"
    cluster.change(**GOOD)
    cluster.run()
    assert cluster.ready()
    assert len(cluster.status.history) == 1


@table
def test_a_cause_that_is_looked_for_is_found_under_a_refused_spec_too(spec: dict[str, Any], reason: Reason) -> None:
    cluster = ready()
    cluster.change(**spec)
    cluster.supervisor(0).fail(Reason.PEER_LOST, "connection to rank 1 was lost", peer=1)
    cluster.hear_all()
    made = cluster.reconcile()
    assert made.requeue_at is not None
    cluster.kill_engine(1)
    cluster.hear_all()
    cluster.reconcile()
    assert cluster.status.history[0].reason is Reason.ENGINE_CRASHED
    assert condition(cluster, ConditionType.STALLED).reason is reason


@table
def test_suspend_removes_the_pods_of_a_refused_spec_and_says_what_to_correct(
    spec: dict[str, Any], reason: Reason
) -> None:
    cluster = ready()
    cluster.change(**spec)
    cluster.run()
    cluster.change(suspend=True)
    cluster.run()
    assert cluster.pods == {}
    suspended = condition(cluster, ConditionType.READY)
    assert suspended.reason is Reason.SUSPENDED
    assert "correct the spec: spec." in suspended.message
    assert not cluster.status.history
    cluster.change(suspend=False)
    cluster.run()
    assert condition(cluster, ConditionType.READY).reason is reason
    assert cluster.pods == {}
    cluster.change(**GOOD)
    cluster.run()
    assert cluster.ready()
    assert not cluster.status.history


@table
def test_a_refused_spec_between_suspend_and_resume_records_no_failure(spec: dict[str, Any], reason: Reason) -> None:
    cluster = ready()
    cluster.change(suspend=True)
    cluster.run()
    cluster.change(suspend=False, **spec)
    cluster.run()
    assert condition(cluster, ConditionType.READY).reason is reason
    cluster.change(**GOOD)
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 2
    assert not cluster.status.history
    assert failures(cluster) == []


def test_an_entry_of_a_list_is_named_as_the_api_server_does() -> None:
    cluster = ready()
    cluster.change(runner={"env": [{"name": "A"}, {"name": "B", "value": 7}]})
    cluster.reconcile()
    told = condition(cluster, ConditionType.READY)
    assert told.reason is Reason.INVALID_SPEC
    assert told.message.startswith("spec.runner.env[1].value: Input should be a valid string (found 7); ")
