"""The rows of the fault matrix and what belongs to them."""

from collections import Counter

from mlx_operator_api.conditions import Reason
from tests.apiserver.faulting import settled
from tests.faults import GOLDEN, Layer, declared

OPERATOR = [row for row in declared() if row.layer is Layer.OPERATOR]


def test_no_two_faults_have_one_name() -> None:
    assert [name for name, times in Counter(row.id for row in declared()).items() if times > 1] == []


def test_every_fault_that_the_operator_tells_has_its_text_of_describe_and_no_text_is_left_over() -> None:
    assert sorted(path.name for path in GOLDEN.glob("*")) == sorted(row.golden.name for row in OPERATOR)


def test_every_fault_that_the_operator_tells_has_words_and_a_bound() -> None:
    assert [row.id for row in OPERATOR if not row.reason or not row.says.strip("… ") or row.within is None] == []


def test_every_reason_of_a_failure_has_a_fault_that_the_operator_tells() -> None:
    """The reasons before it are steps of the lifecycle, not failures."""
    failures = list(Reason)[Reason.INVALID_SPEC.ordinal :]
    assert sorted(set(failures) - {row.reason for row in OPERATOR}) == []


def test_two_texts_of_a_fault_differ_by_what_is_told_and_not_by_who_was_quicker() -> None:
    text = (GOLDEN / "task-rejected.txt").read_text()
    told = next(line for line in text.splitlines() if "(consequence)" in line)
    quicker = text.replace(told, told.partition(": ")[0] + ": RunnerShutdown (consequence), layers 2-3")
    assert quicker != text
    assert settled(quicker) == settled(text)
    assert settled(text.replace("TaskRejected on rank 1", "TaskRejected on rank 0")) != settled(text)
    assert settled(text.replace(told, told.replace(" (consequence)", ""))) != settled(text)
