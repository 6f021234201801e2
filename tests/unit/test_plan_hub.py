"""Models from a hub: one commit for all ranks and over restarts, progress without a flood, patience with downloads."""

from datetime import timedelta

import pytest

from mlx_operator.decide.plan import plan
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.tasks import DownloadModel, TaskPhase
from tests.unit.scenes import condition, ready
from tests.unit.simulator import Cluster

SOURCE = {"source": "hf://org/tiny"}
FIRST, SECOND = "1" * 40, "2" * 40


def downloads(cluster: Cluster) -> list[tuple[int, str | None]]:
    """Rank and commit of every download that was sent."""
    sent = (action.request for action in cluster.sent)
    return [(request.rank, request.task.revision) for request in sent if isinstance(request.task, DownloadModel)]


def adapters(cluster: Cluster) -> list[tuple[int, str | None]]:
    """The same of the adapter."""
    sent = (action.request for action in cluster.sent)
    return [(r.rank, r.task.adapter_revision) for r in sent if isinstance(r.task, DownloadModel)]


def revision(cluster: Cluster) -> str | None:
    return cluster.status.model.revision if cluster.status.model else None


def begun(runners: int = 2) -> Cluster:
    """Every rank is Idle; the first one was told to download."""
    cluster = Cluster(runners=runners, model=SOURCE)
    cluster.run(until=lambda: bool(downloads(cluster)))
    return cluster


def test_rank_0_resolves_the_revision_and_the_others_are_told_its_commit() -> None:
    cluster = begun(runners=3)
    assert downloads(cluster) == [(0, None)]
    cluster.move_branch(2)
    cluster.run()
    assert cluster.ready()
    assert set(downloads(cluster)[1:]) == {(1, SECOND), (2, SECOND)}
    assert revision(cluster) == SECOND
    assert f"digest sha256:abc{SECOND}"[:20] in condition(cluster, ConditionType.MODEL_AVAILABLE).message


def test_the_commit_is_written_before_another_rank_is_told() -> None:
    cluster = begun()
    cluster.tick()
    cluster.hear_all()
    made = plan(cluster.observed(), cluster.now)
    assert made.status.model is not None
    assert made.status.model.revision == FIRST
    assert revision(cluster) is None
    told = [a.request for a in made.actions if hasattr(a, "request")]
    assert [(r.rank, r.task.revision) for r in told if isinstance(r.task, DownloadModel)] == [(1, FIRST)]


def test_a_commit_that_the_source_names_is_told_to_all_at_once() -> None:
    cluster = Cluster(runners=2, model={"source": f"hf://org/tiny@{FIRST}"})
    cluster.move_branch(2)
    cluster.run(until=lambda: len(downloads(cluster)) == 2)
    assert downloads(cluster) == [(0, FIRST), (1, FIRST)]
    cluster.run()
    assert revision(cluster) == FIRST


def test_a_failure_does_not_change_the_model_although_the_branch_moved() -> None:
    cluster = ready(model=SOURCE)
    cluster.move_branch(2)
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 2
    assert set(downloads(cluster)) == {(0, FIRST), (1, FIRST)}
    assert revision(cluster) == FIRST


def test_lost_pods_and_a_restarted_operator_do_not_change_the_model_either() -> None:
    cluster = ready(model=SOURCE)
    cluster.move_branch(2)
    for rank in (0, 1):
        cluster.delete(names.pod_name("tiny", rank))
    cluster.restart_operator()
    cluster.run()
    assert cluster.ready()
    assert revision(cluster) == FIRST


@pytest.mark.parametrize(
    "ask",
    [
        lambda cluster: cluster.annotate(names.RESTART_ANNOTATION, "now"),
        lambda cluster: cluster.change(serving={"maxQueue": 3}),
        lambda cluster: cluster.change(model={"source": "hf://org/tiny@v2"}),
    ],
    ids=["restart annotation", "spec", "source"],
)
def test_whoever_asks_for_something_new_gets_what_the_branch_is_at(ask: object) -> None:
    cluster = ready(model=SOURCE)
    cluster.move_branch(2)
    pods = dict(cluster.pods)
    assert callable(ask)
    ask(cluster)
    cluster.run()
    assert cluster.ready()
    assert revision(cluster) == SECOND
    assert {name: pod.manifest["metadata"]["uid"] for name, pod in cluster.pods.items()} == {
        name: pod.manifest["metadata"]["uid"] for name, pod in pods.items()
    }, "another source of the hub needs no new pod"


@pytest.mark.parametrize("when", ["while suspended", "with the resumption"])
def test_a_restart_that_is_asked_of_a_suspended_instance_comes_with_what_the_branch_is_at(when: str) -> None:
    cluster = ready(model=SOURCE)
    cluster.move_branch(2)
    cluster.change(suspend=True)
    cluster.run()
    if when == "while suspended":
        cluster.annotate(names.RESTART_ANNOTATION, "now")
        cluster.run()
        cluster.change(suspend=False)
    else:
        cluster.annotate(names.RESTART_ANNOTATION, "now")
        cluster.change(suspend=False)
    cluster.run()
    assert cluster.ready()
    assert revision(cluster) == SECOND
    assert (cluster.status.epoch, cluster.status.observed_restart) == (2, "now"), "one new epoch, not two"


def test_a_restart_that_was_followed_before_the_instance_was_suspended_is_not_followed_again() -> None:
    cluster = ready(model=SOURCE)
    cluster.annotate(names.RESTART_ANNOTATION, "now")
    cluster.run()
    cluster.move_branch(2)
    cluster.change(suspend=True)
    cluster.run()
    cluster.change(suspend=False)
    cluster.run()
    assert cluster.ready()
    assert revision(cluster) == FIRST


def test_more_memory_or_another_image_does_not_change_the_model() -> None:
    cluster = ready(model=SOURCE)
    cluster.move_branch(2)
    cluster.change(runner={"resources": {"limits": {"memory": "4Gi"}}})
    cluster.run()
    assert cluster.ready()
    assert cluster.status.epoch == 2
    assert revision(cluster) == FIRST


def test_a_retry_looks_again_only_where_no_model_was_ever_complete() -> None:
    cluster = begun()
    cluster.run(until=lambda: len(downloads(cluster)) == 2)
    for rank in (0, 1):
        cluster.supervisor(rank).download_fails = Reason.MODEL_NOT_FOUND
    cluster.run(30)
    assert cluster.stalled()
    assert revision(cluster) == FIRST
    cluster.move_branch(2)
    for rank in (0, 1):
        cluster.supervisor(rank).download_fails = None
    cluster.annotate(names.RETRY_ANNOTATION, "fixed")
    cluster.run()
    assert cluster.ready()
    assert revision(cluster) == SECOND


def test_where_the_resolver_fails_its_reason_is_told_and_nobody_else_downloads() -> None:
    cluster = begun()
    supervisor = cluster.supervisor(0)
    supervisor.source = ""  # it fails before it knows a commit
    supervisor.download_fails, supervisor.download_words = Reason.MODEL_UNAUTHORIZED, "hf://org/tiny@main is gated"
    cluster.run(30)
    assert downloads(cluster) == [(0, None)]
    stalled = condition(cluster, ConditionType.STALLED)
    assert stalled.reason is Reason.MODEL_UNAUTHORIZED
    assert "rank 0/2 pod tiny-0 on node n1: DownloadModel failed: hf://org/tiny@main is gated" in stalled.message
    assert stalled.message.endswith("kubectl delete pod tiny-0")
    supervisor.source, supervisor.download_fails = SOURCE["source"], None
    cluster.run(400)
    assert cluster.ready()
    assert cluster.status.restarts == 0


def test_progress_causes_at_most_one_write_for_each_step_of_ten_percent() -> None:
    cluster = begun(runners=1)
    supervisor = cluster.supervisor(0)
    supervisor.running = None
    cluster.wait(70)
    cluster.hear_all()
    cluster.reconcile()
    cluster.patches.clear()
    for percent in range(100):
        supervisor.publish(download_percent=percent, download_bytes=1_200_000_000)
        for _ in range(4):
            cluster.wait(2)
            cluster.hear_all()
            cluster.reconcile()
    shown = [patch.runner(0).progress for patch in cluster.patches]
    assert shown == [f"downloading: {step} % of 1.2 GB" for step in range(0, 100, 10)]


def test_a_mounted_model_is_verified_not_downloaded() -> None:
    cluster = Cluster(runners=1)
    cluster.run(until=lambda: bool(downloads(cluster)))
    cluster.supervisor(0).running = None
    cluster.supervisor(0).publish(download_percent=50, download_bytes=2_000_000)
    cluster.wait(10)
    cluster.hear_all()
    cluster.reconcile()
    assert cluster.status.runner(0).progress == "verifying: 50 % of 2.0 MB"


def test_a_download_that_ran_into_its_deadline_is_tried_again_by_itself_free_of_budget() -> None:
    cluster = begun()
    cluster.run(until=lambda: len(downloads(cluster)) == 2)
    for rank in (0, 1):
        cluster.supervisor(rank).running = None
    hour = timedelta(hours=1)
    cluster.wait(hour.total_seconds())
    for rank in (0, 1):
        supervisor = cluster.supervisor(rank)
        supervisor.download_words = "the model was not present within 3600 s: 47 % done; last: HTTP 503"
        supervisor.download_fails = Reason.MODEL_UNREACHABLE
        supervisor._fail_download()
    cluster.hear_all()
    cluster.reconcile()
    assert cluster.stalled()
    cluster.run(400, until=lambda: all(s.report.tasks[-1].attempt == 2 for s in cluster.supervisors()))
    for supervisor in cluster.supervisors():
        supervisor.download_fails, supervisor.running = None, None
        outcome = supervisor.outcomes[TaskName.DOWNLOAD_MODEL]
        assert outcome.phase is TaskPhase.RUNNING
    # The second attempt has an hour of its own: the operator must not end it for the first one's.
    cluster.wait(hour.total_seconds() - 60)
    cluster.hear_all()
    cluster.reconcile()
    assert not cluster.status.history
    assert {record.state for record in cluster.status.runners} == {RunnerState.IDLE}


def test_a_supervisor_that_forgets_its_deadline_is_found_out_all_the_same() -> None:
    cluster = begun(runners=1)
    cluster.supervisor(0).running = None
    cluster.run(30)
    assert cluster.status.runner(0).state is RunnerState.IDLE
    cluster.wait(3600 + 11)
    cluster.hear_all()
    cluster.reconcile()
    assert [failure.reason for failure in cluster.status.history] == [Reason.DOWNLOAD_TIMEOUT]
    assert cluster.status.restarts == 0, "no trouble of a download spends the budget"


def test_every_rank_is_told_the_memory_of_all_so_that_it_knows_its_layers() -> None:
    cluster = Cluster(runners=2, model=SOURCE)
    cluster.memory_limits = {0: 10**9}
    cluster.run(until=lambda: len(downloads(cluster)) == 2)
    tasks = [a.request.task for a in cluster.sent if isinstance(a.request.task, DownloadModel)]
    assert {task.memory_limits for task in tasks} == {(10**9, None)}


# -- adapters
ADAPTED = {"source": "pvc://models/tiny", "adapter": {"source": "hf://org/adapter"}}


def adapter_revision(cluster: Cluster) -> str | None:
    model = cluster.status.model
    return model.adapter.revision if model is not None and model.adapter is not None else None


def test_an_adapter_of_the_hub_is_of_one_commit_on_every_rank_too() -> None:
    cluster = Cluster(runners=2, model=ADAPTED)
    cluster.run(until=lambda: bool(adapters(cluster)))
    assert adapters(cluster) == [(0, None)]
    cluster.move_branch(2)
    cluster.run()
    assert cluster.ready()
    assert adapters(cluster) == [(0, None), (1, SECOND)]
    assert (revision(cluster), adapter_revision(cluster)) == (None, SECOND)
    assert cluster.status.model is not None
    assert cluster.status.model.sources == ("pvc://models/tiny", "hf://org/adapter")


def test_other_ranks_wait_for_both_commits() -> None:
    cluster = Cluster(runners=2, model={"source": f"hf://org/tiny@{FIRST}", "adapter": {"source": "hf://org/adapter"}})
    cluster.run(until=lambda: bool(downloads(cluster)))
    assert downloads(cluster) == [(0, FIRST)], "the model's commit is known, the adapter's is not"
    cluster.run()
    assert cluster.ready()
    assert downloads(cluster)[1:] == [(1, FIRST)]
    assert adapters(cluster)[1:] == [(1, FIRST)]


def test_a_failure_keeps_the_adapter_and_another_adapter_is_resolved_anew_in_the_same_pods() -> None:
    cluster = ready(model=ADAPTED)
    pods = {name: pod.manifest["metadata"]["uid"] for name, pod in cluster.pods.items()}
    cluster.move_branch(2)
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.ready()
    assert adapter_revision(cluster) == FIRST
    cluster.change(model={**ADAPTED, "adapter": {"source": "hf://org/other"}})
    cluster.run()
    assert cluster.ready()
    assert (cluster.status.epoch, adapter_revision(cluster)) == (3, SECOND)
    assert {name: pod.manifest["metadata"]["uid"] for name, pod in cluster.pods.items()} == pods


def test_an_adapter_that_changes_before_the_group_starts_is_never_told_the_commit_of_the_other() -> None:
    cluster = Cluster(runners=2, model={**ADAPTED, "adapter": {"source": f"hf://org/adapter@{FIRST}"}})
    cluster.reconcile()
    assert adapter_revision(cluster) == FIRST
    cluster.change(model=ADAPTED)
    cluster.move_branch(2)
    cluster.run()
    assert cluster.ready()
    assert adapter_revision(cluster) == SECOND


def test_a_refused_spec_keeps_what_is_known_of_the_adapter() -> None:
    cluster = ready(model=ADAPTED)
    known = cluster.status.model
    cluster.change(model={"source": "s3://bucket/model"})
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.status.model == known


def test_what_is_wrong_with_the_adapter_comes_with_a_remedy_for_the_adapter() -> None:
    cluster = Cluster(runners=1, model=ADAPTED)
    cluster.run(until=lambda: bool(downloads(cluster)))
    supervisor = cluster.supervisor(0)
    supervisor.download_fails = Reason.MODEL_NOT_FOUND
    supervisor.download_words = "spec.model.adapter: the adapter in hf://org/adapter@main has no adapters.safetensors"
    cluster.run(30)
    stalled = condition(cluster, ConditionType.STALLED)
    assert stalled.reason is Reason.MODEL_NOT_FOUND
    assert "has no adapters.safetensors; tried again every 5 minutes" in stalled.message
    assert stalled.message.endswith(
        "; correct spec.model.adapter.source: it must lead to a directory with "
        "adapter_config.json and adapters.safetensors"
    )
