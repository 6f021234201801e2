"""Changes by the user, and restarts of the operator."""

from dataclasses import replace
from typing import Any

import pytest

from mlx_operator.decide.actions import CreatePod, DeletePod, SendTask
from mlx_operator.decide.plan import plan
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import CreateRunner, Shutdown
from tests.unit.scenes import condition, ready
from tests.unit.simulator import Cluster


def uids(cluster: Cluster) -> dict[str, str]:
    return {name: pod.manifest["metadata"]["uid"] for name, pod in cluster.pods.items()}


@pytest.mark.parametrize(
    "spec",
    [
        {"serving": {"maxQueue": 1}},
        {"sharding": "Tensor"},
        {"deadlines": {"load": "20m"}},
        {"model": {"source": "pvc://models/other"}},
        {"model": {"source": "pvc://models/tiny", "servedName": "other"}},
    ],
)
def test_what_the_runners_must_know_is_a_new_epoch_in_the_same_pods(spec: dict[str, Any]) -> None:
    cluster = ready()
    before = uids(cluster)
    cluster.change(**spec)
    cluster.run()
    assert cluster.ready()
    assert uids(cluster) == before
    assert cluster.status.epoch == 2
    assert not cluster.status.history


@pytest.mark.parametrize(
    "spec",
    [
        {"runner": {"image": "runner:2"}},
        {"runner": {"nodeSelector": {"gpu": "yes"}}},
        {"runner": {"env": [{"name": "A", "value": "1"}]}},
        {"cache": {"claimName": "cache"}},
        {"model": {"source": "oci://registry.example/models/tiny:1"}},
        {"deadlines": {"shutdown": "5m"}},
    ],
)
def test_another_template_replaces_all_pods(spec: dict[str, Any]) -> None:
    cluster = ready()
    before = uids(cluster)
    cluster.change(**spec)
    cluster.run()
    assert cluster.ready()
    assert not set(uids(cluster).values()) & set(before.values())
    assert cluster.status.epoch == 2
    assert not cluster.status.history, "a change is no failure"


@pytest.mark.parametrize(
    "spec",
    [
        {"deadlines": {"schedule": "1m", "pull": "1m", "unreachable": "20s"}},
        {"restartPolicy": {"maxRestarts": 9}},
        {"suspend": False},
    ],
)
def test_what_only_the_operator_must_know_restarts_nothing(spec: dict[str, Any]) -> None:
    cluster = ready()
    cluster.change(**spec)
    cluster.run()
    assert cluster.status.epoch == 1
    assert cluster.sent == []


def test_a_planned_restart_lets_rank_0_finish_its_requests_first() -> None:
    cluster = ready(3)
    cluster.change(serving={"maxQueue": 1})
    made = cluster.reconcile(act=False)
    sends = [a.request for a in made.actions if isinstance(a, SendTask)]
    assert [(s.rank, s.task) for s in sends] == [(0, Shutdown(grace_seconds=30.0))]


def test_no_epoch_starts_in_pods_of_the_old_template() -> None:
    cluster = ready()
    cluster.change(runner={"image": "runner:2"})
    cluster.reconcile(act=False)
    cluster.kill_engine(0)
    cluster.kill_engine(1)
    cluster.hear_all()
    for _ in range(3):
        cluster.reconcile(act=False)
    assert [r.epoch for r in cluster.status.runners] == [1, 1]
    cluster.run()
    assert cluster.ready()


def test_fewer_runners_delete_the_surplus_pods_and_start_a_new_epoch() -> None:
    cluster = ready(3)
    cluster.change(runners=1)
    cluster.run()
    assert cluster.ready()
    assert set(cluster.pods) == {"tiny-0"}
    assert [r.rank for r in cluster.status.runners] == [0]
    cluster.change(runners=2)
    cluster.run()
    assert cluster.ready()
    assert set(cluster.pods) == {"tiny-0", "tiny-1"}


def test_suspend_removes_the_pods_and_keeps_service_and_history_and_resume_is_a_fresh_epoch() -> None:
    cluster = ready()
    cluster.kill_engine(1)
    cluster.run()
    cluster.change(suspend=True)
    cluster.run()
    assert cluster.pods == {}
    assert cluster.service is not None
    assert condition(cluster, ConditionType.READY).reason is Reason.SUSPENDED
    for kind in (ConditionType.RECONCILING, ConditionType.STALLED):
        assert cluster.condition(kind) == "False"
    assert {r.state for r in cluster.status.runners} == {RunnerState.PENDING}
    assert len(cluster.status.history) == 1
    patches = len(cluster.patches)
    cluster.wait(10_000)
    cluster.run()
    assert len(cluster.patches) == patches
    cluster.change(suspend=False)
    cluster.run()
    assert cluster.ready()
    assert (cluster.status.epoch, cluster.status.restarts) == (3, 0)
    assert len(cluster.status.history) == 1


def test_an_instance_that_is_being_deleted_is_left_to_the_garbage_collector() -> None:
    cluster = ready()
    cluster.instance["metadata"]["deletionTimestamp"] = "2026-11-23T15:00:00Z"
    cluster.kill_engine(1)
    made = plan(cluster.observed(), cluster.now)
    assert made.status == cluster.status
    assert (made.actions, made.events) == ((), ())


def test_a_newer_default_image_restarts_nothing_but_a_restart_annotation_takes_it() -> None:
    cluster = ready()
    before = uids(cluster)
    cluster.settings = replace(cluster.settings, runner_image="runner:2")
    cluster.run()
    assert cluster.status.runner_image == "runner:1"
    assert cluster.patches == []
    cluster.annotate(names.RESTART_ANNOTATION, "1")
    cluster.run()
    assert cluster.ready()
    assert cluster.status.runner_image == "runner:2"
    assert not set(uids(cluster).values()) & set(before.values())
    assert cluster.status.epoch == 2


def test_a_restart_annotation_with_the_same_image_restarts_in_place_once_and_free() -> None:
    cluster = ready()
    before = uids(cluster)
    cluster.annotate(names.RESTART_ANNOTATION, "1")
    cluster.run()
    assert cluster.ready()
    assert (cluster.status.epoch, cluster.status.restarts) == (2, 0)
    assert uids(cluster) == before
    cluster.run()
    assert cluster.status.epoch == 2


def test_an_image_taken_out_of_the_spec_again_is_the_default_again() -> None:
    cluster = ready(runner={"image": "mine:1"})
    assert cluster.status.runner_image == "mine:1"
    cluster.change(runner={})
    cluster.run()
    assert cluster.status.runner_image == "runner:1"
    assert cluster.ready()


def test_annotations_that_were_there_from_the_start_do_nothing() -> None:
    cluster = Cluster()
    cluster.annotate(names.RESTART_ANNOTATION, "old")
    cluster.annotate(names.RETRY_ANNOTATION, "old")
    cluster.run()
    assert cluster.status.epoch == 1


def test_an_annotation_that_is_taken_away_does_nothing() -> None:
    cluster = ready()
    cluster.annotate(names.RESTART_ANNOTATION, "1")
    cluster.run()
    assert cluster.status.epoch == 2
    cluster.instance["metadata"]["annotations"].clear()
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 2


def test_a_retry_annotation_on_a_healthy_group_restarts_nothing() -> None:
    cluster = ready()
    cluster.annotate(names.RETRY_ANNOTATION, "1")
    cluster.run()
    assert cluster.status.epoch == 1
    assert cluster.status.observed_retry == "1"


def test_another_key_of_the_operator_replaces_the_pods() -> None:
    cluster = ready()
    cluster.settings = replace(cluster.settings, key_id="ffffffffff")
    made = cluster.reconcile(act=False)
    assert [a.name for a in made.actions if isinstance(a, DeletePod)] == ["tiny-0", "tiny-1"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"model": {"source": "s3://bucket/model"}}, ("s3://bucket/model", "pvc://CLAIM/PATH")),
        ({"model": {}}, ("spec.model.source",)),
        ({"runners": 65}, ("spec.runners", "65")),
        ({"deadlines": {"load": "10 minutes"}}, ("spec.deadlines.load", "10 minutes", "10m")),
        ({"restartPolicy": {"resetAfter": "soon"}}, ("spec.restartPolicy.resetAfter", "soon")),
    ],
)
def test_an_invalid_stored_spec_is_told_with_field_value_and_remedy_and_changes_nothing(
    spec: dict[str, Any], words: tuple[str, ...]
) -> None:
    cluster = ready()
    before = uids(cluster)
    cluster.change(**spec)
    made = cluster.reconcile()
    assert made.actions == ()
    message = condition(cluster, ConditionType.READY).message
    assert condition(cluster, ConditionType.STALLED).reason is Reason.INVALID_SPEC
    for word in words:
        assert word in message
    assert uids(cluster) == before
    cluster.reconcile()
    assert len(cluster.patches) == 1


def test_a_restarted_operator_writes_and_does_nothing_on_a_converged_cluster() -> None:
    cluster = ready()
    cluster.kill_engine(1)
    cluster.run()
    cluster.restart_operator()
    for _ in range(3):
        made = plan(cluster.observed(), cluster.now)
        assert made.status == cluster.status
        assert (made.actions, made.events) == ((), ())
        cluster.hear_all()


def test_a_restarted_operator_waits_for_reports_before_it_judges_silence() -> None:
    cluster = ready()
    cluster.pods["tiny-1"].partitioned = True
    cluster.wait(10_000)
    cluster.restart_operator()
    cluster.hear_all()
    cluster.reconcile()
    assert not cluster.status.history
    cluster.wait(14)
    cluster.hear_all()
    cluster.reconcile()
    assert not cluster.status.history, "an operator that starts with very many pods needs time to hear them all"
    cluster.wait(2)
    cluster.hear_all()
    cluster.reconcile()
    assert cluster.status.history[0].reason is Reason.RUNNER_UNREACHABLE


def test_a_restarted_operator_hears_a_supervisor_on_a_node_that_is_not_ready_before_it_judges_the_node() -> None:
    cluster = ready()
    cluster.nodes["n2"] = replace(cluster.nodes["n2"], ready=False)
    cluster.restart_operator()
    made = cluster.reconcile()
    assert made.actions == ()
    assert cluster.ready()
    cluster.wait(16)
    cluster.reconcile()
    assert cluster.status.history[0].reason is Reason.NODE_LOST


def test_reports_of_another_instance_or_rank_are_not_believed() -> None:
    cluster = ready()
    view = cluster.views[uids(cluster)["tiny-1"]]
    assert view.report is not None
    for stranger in ({"instance_uid": "another"}, {"rank": 0}):
        report = view.report.model_copy(update={**stranger, "state": RunnerState.FAILED, "incarnation": "other"})
        cluster.views[uids(cluster)["tiny-1"]] = replace(view, report=report)
        made = cluster.reconcile()
        assert made.actions == ()
        assert cluster.ready()


def test_suspending_a_group_that_backs_off_forgets_the_time_of_its_restart() -> None:
    cluster = ready(restartPolicy={"backoff": {"initial": "5m"}})
    for _ in range(2):
        cluster.kill_engine(1)
        cluster.hear_all()
        cluster.reconcile()
        cluster.run(20)
    assert cluster.status.next_restart_at is not None
    cluster.change(suspend=True)
    cluster.run(20)
    assert cluster.status.next_restart_at is None
    assert "restart" not in cluster.status.brief[0]


def test_an_operator_killed_after_the_write_sends_the_tasks_after_its_restart() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: len(cluster.pods) == 2 and all(p.supervisor for p in cluster.pods.values()))
    cluster.hear_all()
    cluster.reconcile(act=False)
    assert [r.epoch for r in cluster.status.runners] == [1, 1]
    cluster.restart_operator()
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 1
    creates = {(s.pod_uid, s.request.epoch) for s in cluster.sent if isinstance(s.request.task, CreateRunner)}
    assert len(creates) == 2


def test_runners_of_an_epoch_that_status_does_not_know_get_a_higher_one() -> None:
    cluster = ready()
    cluster.instance["status"] = {}
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch > 1


def test_a_status_of_a_newer_release_keeps_its_epoch() -> None:
    cluster = ready()
    cluster.instance["status"] = {"epoch": 7, "somethingNew": {}}
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch >= 7


def test_a_pod_of_a_former_instance_is_waited_for() -> None:
    cluster = Cluster()
    cluster.run()
    former = cluster.pods["tiny-0"]
    former.manifest["metadata"]["ownerReferences"][0]["uid"] = "another-uid"
    fresh = Cluster()
    fresh.pods = {"tiny-0": former}
    made = fresh.reconcile()
    assert [a.name for a in made.actions if isinstance(a, CreatePod)] == ["tiny-1"]
    assert not fresh.stalled()
