"""The status writer: one conditional PATCH per difference, and no lost update."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES
from mlx_operator.act.status_writer import ConflictError, StatusWriter, Written, difference, wire
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.status import Condition, RunnerStatus, Status
from tests.unit.fakekube import FakeKube, merged
from tests.unit.manifests import NOW, instance

READY = Condition(
    type=ConditionType.READY,
    status="True",
    reason=Reason.READY,
    message="all runners are ready",
    last_transition_time=NOW,
    observed_generation=1,
)
STATUS = Status(epoch=1, conditions=(READY,), runners=(RunnerStatus(rank=0, pod="tiny-0"),))

json_values = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text(max_size=3), json_values, max_size=4)


@pytest.fixture
def kube() -> FakeKube:
    return FakeKube()


@given(have=json_objects, want=json_objects)
def test_the_difference_makes_the_one_of_the_other(have: dict[str, Any], want: dict[str, Any]) -> None:
    assert merged(have, difference(have, want)) == want


@given(json_objects)
def test_equal_statuses_differ_in_nothing(status: dict[str, Any]) -> None:
    assert difference(status, status) == {}


async def test_the_first_status_is_written_and_the_same_one_is_not_written_again(kube: FakeKube) -> None:
    stored = kube.put(INSTANCES, instance())
    writer = StatusWriter(kube)
    written, answer = await writer.write(stored, STATUS)
    assert written is Written.WRITTEN
    assert answer["status"] == wire(STATUS)
    again, _ = await writer.write(answer, STATUS)
    assert again is Written.UNCHANGED
    assert kube.count("patch", "modelinstances") == 1


async def test_a_conflict_writes_nothing_and_gives_the_fresh_object(kube: FakeKube) -> None:
    old = kube.put(INSTANCES, instance())
    fresh = kube.put(INSTANCES, {**old, "spec": {"runners": 3}})
    with pytest.raises(ConflictError) as conflict:
        await StatusWriter(kube).write(old, STATUS)
    assert conflict.value.fresh["metadata"]["resourceVersion"] == fresh["metadata"]["resourceVersion"]
    assert "status" not in kube.objects["modelinstances", "default", "tiny"]


async def test_a_write_whose_answer_was_lost_counts_as_written(kube: FakeKube) -> None:
    stored = kube.put(INSTANCES, instance())

    def lose(verb: str, plural: str, name: str) -> None:
        raise KubeError(0, "TimeoutError", "no answer")

    kube.after = lose
    written, answer = await StatusWriter(kube).write(stored, STATUS)
    assert written is Written.WRITTEN
    assert answer["status"] == wire(STATUS)


async def test_a_write_that_was_not_carried_out_raises(kube: FakeKube) -> None:
    stored = kube.put(INSTANCES, instance())

    def fail(verb: str, plural: str, name: str) -> None:
        if verb == "patch":
            raise KubeError(503, "ServiceUnavailable", "try later")

    kube.before = fail
    with pytest.raises(KubeError) as error:
        await StatusWriter(kube).write(stored, STATUS)
    assert error.value.status == 503


async def test_a_namesake_made_meanwhile_is_not_mistaken_for_ours(kube: FakeKube) -> None:
    stored = kube.put(INSTANCES, instance())
    kube.put(INSTANCES, instance(uid="another", status=wire(STATUS)))
    with pytest.raises(ConflictError):
        await StatusWriter(kube).write(stored, STATUS)


def test_a_value_that_is_absent_now_is_removed() -> None:
    assert difference({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"d": 2}}) == {"a": None, "b": {"c": None}}


def test_lists_are_replaced_whole() -> None:
    assert difference({"a": [1, 2]}, {"a": [1]}) == {"a": [1]}
