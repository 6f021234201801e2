"""Where the planner's tests begin: a ready group, and how they look at it."""

from typing import Any

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.status import Condition, GroupFailure
from tests.unit.simulator import Cluster


def ready(runners: int = 2, **spec: Any) -> Cluster:
    cluster = Cluster(runners=runners, **spec)
    cluster.run()
    assert cluster.ready()
    cluster.patches.clear()
    cluster.events.clear()
    cluster.sent.clear()
    return cluster


def see(cluster: Cluster) -> GroupFailure:
    """The operator hears everything and plans once; the last recorded failure."""
    cluster.hear_all()
    cluster.reconcile()
    assert cluster.status.history, cluster.status.brief
    return cluster.status.history[0]


def condition(cluster: Cluster, kind: ConditionType) -> Condition:
    found = cluster.status.condition(kind)
    assert found is not None
    return found


def failures(cluster: Cluster) -> list[str]:
    return [event.note for event in cluster.events if event.reason is Reason.RUNNER_FAILED]
