"""Which deaths of an engine may be the doing of a request."""

import signal
from datetime import UTC, datetime
from typing import Any

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import GroupCause, RunnerReport
from mlx_runner.supervisor import evidence
from mlx_runner.supervisor.blame import explained, own_doing, verdict
from mlx_runner.supervisor.diagnosis import of_exit

BY_ITSELF = {"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"}


def exited(code: int, *, oom_kills: int = 0, killed_for: str | None = None, rank: int = 0) -> bool:
    """The verdict on an engine that ended with a return code (negative: a signal)."""
    exit_ = evidence.decode(code, oom_kills, (), killed_for)
    report = RunnerReport(
        instance_uid="u",
        rank=rank,
        incarnation="i",
        seq=1,
        epoch=3,
        world_size=2,
        group="present",
        state=RunnerState.RUNNING,
        since=datetime.now(UTC),
    )
    return own_doing(of_exit(exit_, report).reason, signal=exit_.signal, abandoned=exit_.killed_for is not None)


@pytest.mark.parametrize("number", sorted(signal.valid_signals()))
def test_a_signal_that_a_process_brings_upon_itself_is_its_own_doing_and_no_other(number: int) -> None:
    assert exited(-number) == (evidence.decode(-number, 0, ()).signal in BY_ITSELF)


@pytest.mark.parametrize(
    ("facts", "own"),
    [
        ({"code": 3}, True),
        ({"code": 0}, True),
        ({"code": 0, "rank": 1}, False),  # as after a goodbye of rank 0: a lost peer
        ({"code": -9, "oom_kills": 1}, False),  # the kernel's choice
        ({"code": -9, "killed_for": "it closed its channel"}, True),
        ({"code": -9, "killed_for": "it sent a line longer than 16777216 bytes"}, True),
    ],
)
def test_an_end_is_the_engines_own_doing(facts: Any, own: bool) -> None:
    assert exited(**facts) is own


@pytest.mark.parametrize("reason", list(Reason))
def test_of_what_an_engine_reports_only_an_exception_of_its_own_is_its_own_doing(reason: Reason) -> None:
    assert own_doing(reason) == (reason is Reason.ENGINE_CRASHED)


@pytest.mark.parametrize(
    ("cause", "own"),
    [
        (None, False),
        (GroupCause(epoch=3, rank=1, reason=Reason.ENGINE_CRASHED, signal="SIGSEGV"), True),
        (GroupCause(epoch=3, rank=1, reason=Reason.ENGINE_CRASHED), True),
        (GroupCause(epoch=2, rank=1, reason=Reason.ENGINE_CRASHED), False),  # of another epoch
        (GroupCause(epoch=3, rank=1, reason=Reason.ENGINE_CRASHED, signal="SIGKILL"), False),
        (GroupCause(epoch=3, rank=1, reason=Reason.OUT_OF_MEMORY, signal="SIGKILL"), False),
        (GroupCause(epoch=3, rank=1, reason=Reason.RUNNER_STALLED), False),
        (GroupCause(epoch=3, rank=1, reason=Reason.POD_DELETED), False),
    ],
)
def test_a_lost_peer_is_explained_by_the_cause_that_the_operator_found(cause: GroupCause | None, own: bool) -> None:
    assert verdict(Reason.PEER_LOST) is None
    assert explained(cause, epoch=3) is own
