"""Waiting: deadlines, signs of life, and logs in errors."""

from pathlib import Path

import pytest

from tests.cluster import waiting
from tests.cluster.errors import ClusterError
from tests.cluster.waiting import ended, tail, wait_until


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def test_the_first_true_answer_is_returned(clock: Clock) -> None:
    answers = iter([None, "", "yes"])
    assert wait_until(lambda: next(answers), what="it is there", seconds=5) == "yes"


def test_a_deadline_ends_with_what_was_awaited_and_the_end_of_the_log(clock: Clock, tmp_path: Path) -> None:
    log = tmp_path / "kubelet.log"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    with pytest.raises(ClusterError) as caught:
        wait_until(lambda: False, what="node n1 is Ready", seconds=12, log=log)
    assert str(caught.value).startswith(f"Waited 12 s until node n1 is Ready, in vain. The end of {log}:\nline 85\n")
    assert str(caught.value).endswith("line 99")
    assert clock.now == pytest.approx(112, abs=1)


def test_a_line_is_said_every_five_seconds(clock: Clock) -> None:
    lines: list[str] = []
    with pytest.raises(ClusterError):
        wait_until(lambda: False, what="it is up", seconds=16, progress=lines.append)
    assert lines == [f"still waiting until it is up ({seconds} of 16 s)" for seconds in (5, 10, 15)]


def test_a_check_that_gives_up_ends_the_wait_at_once(clock: Clock, tmp_path: Path) -> None:
    def check() -> bool:
        raise ended("etcd", tmp_path / "etcd.log")

    with pytest.raises(ClusterError, match=r"Gave up waiting until it is up: etcd ended\.[^|]*there is no log"):
        wait_until(check, what="it is up", seconds=60)
    assert clock.now == 100


def test_the_tail_of_a_huge_log_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x" * 70 + "\n" + "y\n" * 500_000)
    assert tail(log, 3) == "y\ny\ny"
    log.write_text("")
    assert "is empty" in tail(log)
