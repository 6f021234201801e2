"""Properties of the planner under random event orders, losses, duplicates, crashes and restarts of the operator.

The simulator raises `BrokenPromiseError` by itself when an epoch goes back, a recorded failure is lost, the budget is
overspent, a task is sent that the table rejects, a pod is created twice, ConnectToGroup goes out before all ranks are
recorded, an epoch gets two engines of one rank, or its ranks use different commits of the model.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_operator.decide.plan import plan
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import ORDER, RunnerState
from tests.unit.simulator import Cluster

Event = Callable[[Cluster], Any]


def tick(cluster: Cluster, times: int) -> None:
    for _ in range(times):
        cluster.tick()


def hear(cluster: Cluster, rank: int) -> None:
    pod = cluster.pods.get(f"tiny-{rank}")
    if pod is not None:
        cluster.hear(pod.manifest["metadata"]["uid"])


def reconcile_partly(cluster: Cluster, actions: int) -> None:
    """The operator is killed after some of its actions; another one starts."""
    made = cluster.reconcile(act=False)
    for action in made.actions[:actions]:
        cluster._act(action)
    cluster.restart_operator()


def repeat_task(cluster: Cluster, index: int) -> None:
    """A task that was sent arrives a second time, or late."""
    if cluster.sent:
        cluster.deliver_again(cluster.sent[index % len(cluster.sent)])


def on_rank(method: str) -> Callable[[Cluster, int], None]:
    def act(cluster: Cluster, rank: int) -> None:
        pod = cluster.pods.get(f"tiny-{rank}")
        if pod is not None and pod.supervisor is not None:
            getattr(cluster, method)(rank)

    return act


def delete_pod(cluster: Cluster, rank: int) -> None:
    cluster.delete(f"tiny-{rank}")


def partition(cluster: Cluster, rank: int) -> None:
    pod = cluster.pods.get(f"tiny-{rank}")
    if pod is not None:
        pod.partitioned = True
        cluster.lose_stream(f"tiny-{rank}")


def heal(cluster: Cluster) -> None:
    for pod in cluster.pods.values():
        pod.partitioned = False
    for node in cluster.nodes:
        cluster.heal_node(node)
    cluster.unplaceable = None
    cluster.catch_up()


RANKS = st.integers(0, 2)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.integers(1, 5).map(lambda n: lambda c: tick(c, n)),
    st.just(lambda c: c.hear_all()),
    RANKS.map(lambda r: lambda c: hear(c, r)),
    st.just(lambda c: c.reconcile()),
    st.just(lambda c: c.reconcile()),
    st.integers(0, 4).map(lambda n: lambda c: reconcile_partly(c, n)),
    st.integers(0, 50).map(lambda n: lambda c: repeat_task(c, n)),
    st.just(lambda c: c.restart_operator()),
    st.sampled_from(["kill_engine", "kill_container", "lose_report"]).flatmap(
        lambda name: RANKS.map(lambda r: lambda c: on_rank(name)(c, r))
    ),
    RANKS.map(lambda r: lambda c: delete_pod(c, r)),
    RANKS.map(lambda r: lambda c: partition(c, r)),
    st.sampled_from(["n1", "n2"]).map(lambda n: lambda c: c.lose_node(n)),
    st.just(heal),
    st.just(lambda c: c.lag()),
    st.just(lambda c: c.catch_up()),
    st.sampled_from([1, 2, 3]).map(lambda n: lambda c: c.change(runners=n)),
    st.booleans().map(lambda b: lambda c: c.change(suspend=b)),
    st.sampled_from(["pvc://models/tiny", "hf://a/b", "s3://a/b"]).map(
        lambda s: lambda c: c.change(model={"source": s})
    ),
    st.integers(1, 9).map(lambda n: lambda c: c.move_branch(n)),
    st.integers(1, 3).map(lambda n: lambda c: c.change(serving={"maxQueue": n})),
    st.integers(1, 3).map(lambda n: lambda c: c.annotate(names.RETRY_ANNOTATION, str(n))),
    st.integers(1, 3).map(lambda n: lambda c: c.annotate(names.RESTART_ANNOTATION, str(n))),
    st.floats(1, 700).map(lambda s: lambda c: c.wait(s)),
)
MUCH = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@MUCH
@given(
    st.integers(1, 3),
    st.sampled_from(["Pipeline", "Tensor"]),
    st.sampled_from(["pvc://models/tiny", "hf://a/b"]),
    st.lists(EVENTS, max_size=40),
)
def test_whatever_happens_the_group_ends_ready_or_stalled_with_a_reason_and_rests(
    size: int, sharding: str, source: str, story: list[Event]
) -> None:
    cluster = Cluster(runners=size, sharding=sharding, model={"source": source})
    for event in story:
        event(cluster)
    heal(cluster)
    cluster.change(suspend=False, model={"source": source})
    cluster.run(3600)
    assert cluster.ready() or cluster.stalled(), cluster.status.brief
    if cluster.stalled():
        stalled = cluster.status.condition(ConditionType.STALLED)
        assert stalled is not None
        assert stalled.reason in (Reason.RESTART_BUDGET_EXHAUSTED,), cluster.status.brief
        cluster.annotate(names.RETRY_ANNOTATION, "again")
        cluster.run(3600)
    assert cluster.ready(), cluster.status.brief
    rests(cluster)


def rests(cluster: Cluster) -> None:
    """Planning again changes nothing, does nothing, says nothing; also for an operator that has just started."""
    for _ in range(2):
        made = plan(cluster.observed(), cluster.now)
        assert made.status == cluster.status
        assert made.actions == ()
        assert made.events == ()
        cluster.restart_operator()


@MUCH
@given(st.lists(EVENTS, max_size=30))
def test_a_plan_is_repeated_by_its_own_status(story: list[Event]) -> None:
    """What was written is what the next pass starts from: the same observation then changes nothing more."""
    cluster = Cluster()
    for event in story:
        event(cluster)
    cluster.reconcile(act=False)
    patches = len(cluster.patches)
    # A failure, a change seen with it, and the epoch that follows are three writes: no more passes are needed.
    cluster.reconcile(act=False)
    cluster.reconcile(act=False)
    patches_then = len(cluster.patches)
    cluster.reconcile(act=False)
    assert len(cluster.patches) == patches_then
    assert patches_then - patches <= 2


@MUCH
@given(st.lists(EVENTS, max_size=30))
def test_states_never_go_back_within_an_epoch(story: list[Event]) -> None:
    cluster = Cluster()
    for event in story:
        event(cluster)
        cluster.hear_all()
        cluster.reconcile()
    for before, after in zip(cluster.patches, cluster.patches[1:], strict=False):
        for record in after.runners:
            old = before.runner(record.rank)
            if record.epoch < after.epoch and record.state is RunnerState.PENDING:
                continue  # its epoch is over and its pod is gone
            moved = record.pod_uid == old.pod_uid and record.epoch == old.epoch and after.epoch == before.epoch
            if moved and after.condition(ConditionType.READY).reason is not Reason.SUSPENDED:  # type: ignore[union-attr]
                assert ORDER[record.state] >= ORDER[old.state], (old, record)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_quick_way_to_ready_takes_three_patches_and_four_events(size: int) -> None:
    cluster = Cluster(runners=size)
    cluster.run()
    assert cluster.ready()
    assert len(cluster.patches) == 3
    assert len(cluster.events) == 4
    assert sorted(cluster.created) == [f"tiny-{rank}" for rank in range(size)]
