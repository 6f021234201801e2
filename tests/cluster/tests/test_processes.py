"""Background programs: what is recorded, and what is never signalled."""

import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.processes import Record, command_line, spawn
from tests.cluster.waiting import wait_until


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def start(folder: Path, *argv: str) -> Record:
    return spawn(argv, record=folder / "records" / "it", log=folder / "logs" / "it.log")


def test_a_program_is_recorded_under_its_own_id_and_start_time(tmp_path: Path) -> None:
    record = start(tmp_path, "sleep", "300")
    try:
        assert Record.read(tmp_path / "records" / "it") == record == Record.of(record.pid)
        wait_until(lambda: command_line(record.pid) == "sleep 300", what="it is the program", seconds=10)
        assert os.getsid(record.pid) == record.pid, "a terminal's Ctrl-C must not reach it"
    finally:
        record.stop(grace=0)
    assert not record.alive()


def test_stop_asks_first_and_kills_afterwards(tmp_path: Path) -> None:
    polite = start(tmp_path, "sh", "-c", "trap 'echo bye; exit 0' TERM; echo on; while :; do sleep 0.05; done")
    log = tmp_path / "logs" / "it.log"
    wait_until(lambda: "on" in log.read_text(), what="the trap is set", seconds=10)
    polite.stop(grace=10)
    assert log.read_text() == "on\nbye\n"
    stubborn = start(tmp_path, "sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.05; done")
    wait_until(lambda: "deaf" in log.read_text(), what="the trap is set", seconds=10)
    stubborn.stop(grace=0.2)
    assert not stubborn.alive()


def test_a_process_that_got_the_id_of_a_recorded_one_is_never_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    now = Record.of(sleeper.pid)
    assert now is not None
    for stranger in (
        dataclasses.replace(now, started=now.started - 1),
        dataclasses.replace(now, boot_id="00000000-0000-0000-0000-000000000000"),
    ):
        assert not stranger.alive()
        assert not stranger.send(signal.SIGKILL)
        stranger.stop(grace=0)
        assert sleeper.poll() is None
    assert now.alive()


def test_an_ended_child_is_not_alive_and_leaves_no_zombie(tmp_path: Path) -> None:
    record = start(tmp_path, "sleep", "300")
    assert record.send(signal.SIGKILL)
    wait_until(lambda: not record.alive(), what="it ended", seconds=10)
    assert Record.of(record.pid) is None
    assert not record.send(signal.SIGTERM)


def test_a_program_that_cannot_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    record = start(tmp_path, "sleep", "300")
    record.stop(grace=0)
    with pytest.raises(ClusterError, match=r"(?s)it ended\..*it\.log"):
        spawn(
            ["sleep", "1"], record=tmp_path / "records" / "it", log=tmp_path / "logs" / "it.log", cgroup=Path("/nope")
        )


@pytest.mark.parametrize("text", ["", "12", "12 34", "a b c", "1 2 3 4"])
def test_half_a_record_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "record").write_text(text)
    assert Record.read(tmp_path / "record") is None
    assert Record.read(tmp_path / "missing") is None
