"""A timeout is told by the rank that waits: the word of the rank it waits for goes before it."""

from collections.abc import Callable

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import GroupFailure
from tests.unit.scenes import failures, see
from tests.unit.simulator import Cluster


def connecting() -> Cluster:
    cluster = Cluster(runners=3)
    cluster.run(until=lambda: [s.report.state for s in cluster.supervisors()] == [RunnerState.CONNECTING] * 3)
    for supervisor in cluster.supervisors():
        supervisor.running = None
    cluster.hear_all()
    cluster.reconcile()
    return cluster


def by_report(cluster: Cluster, rank: int, accused: int) -> None:
    cluster.supervisor(rank).publish(waiting_for=(accused,))
    cluster.supervisor(rank).fail(Reason.CONNECT_TIMEOUT, "not connected within 40 s")


def by_message(cluster: Cluster, rank: int, accused: int) -> None:
    cluster.supervisor(rank).fail(
        Reason.CONNECT_TIMEOUT, f"not connected within 40 s, still waiting for rank {accused} (10.0.0.9:8082)"
    )


def silent(cluster: Cluster, rank: int) -> None:
    """Out of touch for longer than its deadline."""
    cluster.pods[f"tiny-{rank}"].partitioned = True
    cluster.lose_stream(f"tiny-{rank}")
    cluster.wait(16)


def see_at_last(cluster: Cluster) -> GroupFailure:
    """The accused had its time to speak."""
    cluster.hear_all()
    cluster.reconcile()
    assert not cluster.status.history
    cluster.wait(2.5)
    return see(cluster)


@pytest.mark.parametrize("accuse", [by_report, by_message])
@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (silent, Reason.RUNNER_UNREACHABLE),
        (lambda c, rank: c.kill_engine(rank), Reason.ENGINE_CRASHED),
        (lambda c, rank: c.kill_container(rank, reason="Error"), Reason.CONTAINER_CRASHED),
        (lambda c, rank: c.delete(f"tiny-{rank}"), Reason.POD_DELETED),
    ],
    ids=["silent", "engine", "container", "deleted"],
)
@pytest.mark.parametrize("late", [False, True], ids=["together", "later"])
def test_the_rank_that_is_waited_for_is_the_cause_where_it_has_a_reason_of_its_own(
    accuse: Callable[[Cluster, int, int], None], word: Callable[[Cluster, int], None], reason: Reason, late: bool
) -> None:
    cluster = connecting()
    accuse(cluster, 0, 1)
    if late:
        failure = see_at_last(cluster)
        assert (failure.rank, failure.reason) == (0, Reason.CONNECT_TIMEOUT)
    word(cluster, 1)
    failure = see(cluster)
    assert (failure.rank, failure.reason) == (1, reason)
    assert len(cluster.status.history) == 1
    assert len(failures(cluster)) == 1


@pytest.mark.parametrize("late", [False, True], ids=["together", "later"])
def test_a_silent_rank_that_nobody_waits_for_does_not_replace_a_connect_timeout(late: bool) -> None:
    cluster = connecting()
    by_report(cluster, 0, 1)
    if late:
        see_at_last(cluster)
    silent(cluster, 2)
    failure = see(cluster) if late else see_at_last(cluster)
    assert (failure.rank, failure.reason) == (0, Reason.CONNECT_TIMEOUT)


def test_ranks_that_wait_for_each_other_accuse_nobody_else_and_the_first_is_told() -> None:
    cluster = connecting()
    by_report(cluster, 0, 1)
    cluster.now = cluster.now.replace(microsecond=0)
    by_report(cluster, 1, 0)
    assert see_at_last(cluster).reason is Reason.CONNECT_TIMEOUT


@pytest.mark.parametrize("late", [False, True], ids=["together", "later"])
def test_a_rank_that_is_waited_for_and_waits_for_nobody_is_the_cause(late: bool) -> None:
    cluster = connecting()
    by_report(cluster, 0, 1)
    by_report(cluster, 2, 1)
    if late:
        assert see_at_last(cluster).rank == 0
    cluster.supervisor(1).fail(Reason.CONNECT_TIMEOUT, "not connected within 40 s: the engine named no rank")
    failure = see(cluster)
    assert (failure.rank, failure.reason, len(cluster.status.history)) == (1, Reason.CONNECT_TIMEOUT, 1)
    assert late or failure.consequences == (0, 2)


@pytest.mark.parametrize("late", [False, True], ids=["together", "later"])
def test_a_warm_up_that_waits_for_another_rank_yields_to_the_word_of_that_one(late: bool) -> None:
    cluster = Cluster(runners=2)
    warming = [RunnerState.WARMING_UP] * 2
    cluster.run(until=lambda: [s.report.state for s in cluster.supervisors()] == warming)
    cluster.hear_all()
    cluster.reconcile()
    cluster.supervisor(1).fail(
        Reason.WARMUP_TIMEOUT, "warm-up not done within 300 s, step 1, waiting for rank 0", peer=0
    )
    if late:
        assert see_at_last(cluster).rank == 1
    cluster.supervisor(0).fail(Reason.WARMUP_TIMEOUT, "warm-up not done within 300 s, step 0")
    failure = see(cluster)
    assert (failure.rank, failure.reason, len(cluster.status.history)) == (0, Reason.WARMUP_TIMEOUT, 1)
    assert late or failure.consequences == (1,)
