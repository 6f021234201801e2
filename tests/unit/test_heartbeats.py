"""Reports in memory, and the lines of a stream that only say that nothing changed."""

from datetime import timedelta

import pytest

from mlx_operator.decide.observed import RunnerView
from mlx_operator.observe.runners import LastLine, Urgency, lean, receive
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import ModelFacts, RunnerReport, TaskOutcome, TaskPhase
from tests.unit.manifests import NOW, report

LATER = NOW + timedelta(seconds=2)
DONE = tuple(TaskOutcome(name=name, epoch=1, phase=TaskPhase.COMPLETE) for name in TaskName)
FAILURE = LastFailure(
    epoch=1, state=RunnerState.READY, reason=Reason.ENGINE_CRASHED, message="it died", time=NOW.replace(microsecond=0)
)


def line(said: RunnerReport) -> bytes:
    return said.model_dump_json(by_alias=True).encode() + b"\n"


def heard(said: RunnerReport) -> tuple[LastLine, RunnerView]:
    """A stream whose first line this was."""
    last = LastLine()
    last.keep(line(said), said)
    return last, receive(RunnerView(), said, NOW, stream=True)[0]


def test_a_heartbeat_is_heard_without_being_decoded() -> None:
    last, view = heard(report(seq=1))
    repeated = last.repeated(line(report(seq=2)), view, LATER)
    assert repeated is not None
    assert repeated.report is view.report
    assert (repeated.repeated, repeated.received) == (2, LATER)


@pytest.mark.parametrize(
    "said",
    [
        report(seq=2, state=RunnerState.READY),
        report(seq=2, steps=1),
        report(seq=1),
        report(seq=2, incarnation="another"),
    ],
    ids=["another state", "counters", "no higher seq", "another incarnation"],
)
def test_a_line_that_says_anything_else_is_decoded(said: RunnerReport) -> None:
    last, view = heard(report(seq=1))
    assert last.repeated(line(said), view, LATER) is None


def test_a_heartbeat_is_decoded_after_an_answer_that_said_something_else() -> None:
    last, view = heard(report(seq=1))
    answered, _ = receive(view, report(seq=2, state=RunnerState.CONNECTING), NOW, stream=False)
    assert last.repeated(line(report(seq=3)), answered, LATER) is None


def test_a_heartbeat_is_decoded_after_a_line_that_could_not_be() -> None:
    last, view = heard(report(seq=1))
    broken = RunnerView(report=view.report, connected=True, error="report cannot be decoded", undecodable=True)
    assert last.repeated(line(report(seq=2)), broken, LATER) is None


def test_a_number_of_a_name_that_comes_before_the_reports_own_is_not_taken_for_it() -> None:
    said = report(seq=1)
    newer = b'{"extra":{"seq":7},' + line(said)[1:]
    last = LastLine()
    last.keep(newer, said)
    view, _ = receive(RunnerView(), said, NOW, stream=True)
    assert last.repeated(newer.replace(b'"seq":7', b'"seq":8'), view, LATER) is None


def test_an_answer_from_before_a_heartbeat_comes_too_late() -> None:
    last, view = heard(report(seq=1))
    repeated = last.repeated(line(report(seq=5)), view, LATER)
    assert repeated is not None
    merged, urgency = receive(repeated, report(seq=4, state=RunnerState.CONNECTING), LATER, stream=False)
    assert merged.report is view.report
    assert urgency is Urgency.NONE
    newest, _ = receive(merged, report(seq=6, state=RunnerState.CONNECTING), LATER, stream=False)
    assert newest.report == report(seq=6, state=RunnerState.CONNECTING)
    assert newest.repeated == 0


def test_a_lean_report_is_the_same_report() -> None:
    model = ModelFacts(digest="sha256:1", bytes=1000, layers=4)
    full = report(tasks=DONE, model=model, failure=FAILURE, waiting_for=(1,))
    decoded = RunnerReport.model_validate_json(line(full))
    assert lean(decoded) == decoded == full
    assert line(lean(decoded)) == line(full)


def test_lean_reports_of_runners_that_are_as_far_share_what_is_long() -> None:
    one, two = (lean(RunnerReport.model_validate_json(line(report(seq=seq, tasks=DONE)))) for seq in (1, 2))
    assert one.tasks is two.tasks
    assert one.model_fields_set is two.model_fields_set
