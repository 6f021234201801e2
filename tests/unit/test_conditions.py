"""Conditions: complete, written as a whole, with a time that moves only when the status flips."""

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_operator.decide.conditions import Fact, conclude
from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.status import Status
from tests.unit.simulator import START, Cluster

VALUES = st.sampled_from(["True", "False", "Unknown"])
FACTS = st.fixed_dictionaries(
    {kind: st.builds(Fact, VALUES, st.sampled_from(list(Reason)), st.text(max_size=50)) for kind in ConditionType}
)


@given(st.lists(FACTS, min_size=1, max_size=6))
def test_the_transition_time_moves_exactly_when_the_status_flips(history: list[dict[ConditionType, Fact]]) -> None:
    status = Status()
    for step, facts in enumerate(history):
        now = START + timedelta(seconds=step)
        conditions = conclude(facts, status, step, now)
        for condition in conditions:
            before = status.condition(condition.type)
            flipped = before is None or before.status != condition.status
            assert condition.last_transition_time == (now if flipped else before and before.last_transition_time)
            assert condition.observed_generation == step
            assert condition.reason is facts[condition.type].reason
            assert condition.message
        status = status.model_copy(update={"conditions": conditions})


def test_all_conditions_are_there_from_the_first_pass_with_ready_first() -> None:
    cluster = Cluster()
    cluster.reconcile()
    first = cluster.patches[0]
    assert [c.type for c in first.conditions] == list(ConditionType)
    assert first.conditions[0].type is ConditionType.READY
    assert {c.status for c in first.conditions} <= {"True", "False", "Unknown"}
    assert all(c.message and c.observed_generation == 1 for c in first.conditions)


def test_observed_generation_follows_every_edit_also_one_without_a_meaning() -> None:
    cluster = Cluster()
    cluster.run()
    cluster.change(suspend=False)
    epoch, patches = cluster.status.epoch, len(cluster.patches)
    cluster.run()
    assert cluster.status.observed_generation == 2
    assert all(c.observed_generation == 2 for c in cluster.status.conditions)
    assert cluster.status.epoch == epoch
    assert len(cluster.patches) == patches + 1


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_says_what_it_means_and_where_somebody_must_act_what_to_do(reason: Reason) -> None:
    assert reason.meaning.strip()
    assert reason.value.isidentifier()
    assert reason.value[0].isupper()
    if reason.retry in (Retry.NEVER, Retry.WAIT):
        assert reason.remedy
    assert not reason.remedy.endswith(".")


def test_reconciling_and_stalled_are_never_true_together() -> None:
    cluster = Cluster()
    for _ in range(7):
        cluster.run(30)
        cluster.kill_engine(1)
    cluster.run()
    for status in cluster.patches:
        values = {c.type: c.status for c in status.conditions}
        assert (values[ConditionType.RECONCILING], values[ConditionType.STALLED]) != ("True", "True")
        busy = "True" in (values[ConditionType.RECONCILING], values[ConditionType.STALLED], values[ConditionType.READY])
        assert busy, "kstatus would call it Current although it is not Ready"
    assert cluster.stalled()
