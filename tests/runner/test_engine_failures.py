"""What an engine reports, and how it ends, when its group breaks or ends."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Sharding
from mlx_runner import channel
from mlx_runner.progress import Progress

from . import tiny_models
from .conftest import PROMPTS
from .engine_ranks import (
    Rank,
    Ranks,
    UnexpectedError,
    address,
    environment,
    generate,
    running,
    wait_listening,
    wait_until,
)

Tiny = Callable[[str], Path]
NOTICED = 10.0
"""Seconds; measured 10-50 ms on an idle machine."""


def failure(rank: Rank, seconds: float = NOTICED) -> channel.Failure:
    """The failure that a rank reports; anything else is read over."""
    while not isinstance(event := rank.next(seconds), channel.Failure):
        pass
    return event


def followed(told: dict[int, channel.Failure], number: int) -> Iterator[int | None]:
    """The rank that a rank names, the one which that one names, and so on."""
    for _ in told:
        name = told[number].peer
        yield name
        if name not in told:
            return
        number = name


@pytest.mark.parametrize(
    ("world_size", "sharding", "killed", "busy"),
    [
        (2, Sharding.PIPELINE, 0, False),
        (2, Sharding.TENSOR, 1, True),
        (3, Sharding.PIPELINE, 2, True),
    ],
)
def test_when_a_rank_is_killed_the_others_name_it_and_end(
    tmp_path: Path, tiny: Tiny, world_size: int, sharding: Sharding, killed: int, busy: bool
) -> None:
    with running(tmp_path, world_size, sharding) as ranks:
        ranks.serve(tiny("qwen2"))
        if busy:
            ranks[0].send(generate("lost", PROMPTS[0], 2000))
            for _ in range(5):
                ranks[0].expect(channel.Delta)
        ranks[killed].kill()
        others = [rank for rank in ranks.ranks if rank.rank != killed]
        told = {rank.rank: failure(rank) for rank in others}
        for rank in others:
            word = told[rank.rank]
            assert word.reason is Reason.PEER_LOST, f"rank {rank.rank}: {word}"
            assert f"rank {word.peer}" in word.message
            assert rank.exit_code() == channel.FAILURE_EXIT_CODE
        # One that looked late may name a neighbour that has ended for the same reason: that one knows more.
        assert killed in [word.peer for word in told.values()]
        assert all(list(followed(told, number))[-1] == killed for number in told), told


def test_an_engine_whose_supervisor_is_gone_ends_itself(tmp_path: Path, tiny: Tiny) -> None:
    with running(tmp_path, 1) as ranks:
        ranks.serve(tiny("qwen2"))
        ranks[0].send(generate("running", PROMPTS[0], 1900))
        ranks[0].expect(channel.Delta)
        ranks[0].hang_up()
        assert ranks[0].exit_code() == channel.FAILURE_EXIT_CODE


PARENT = """
import os, socket, subprocess, sys
ours, theirs = socket.socketpair()
environment = {**os.environ, "MLX_RUNNER_CHANNEL_FD": str(theirs.fileno())}
engine = subprocess.Popen([sys.executable, "-m", "mlx_runner.engine"], env=environment, pass_fds=[theirs.fileno()])
ours.recv(1)
print(engine.pid, flush=True)
engine.wait()
"""


def test_a_stopped_engine_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    page = tmp_path / "progress"
    Progress(page, create=True).close()
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env={**environment(), channel.PROGRESS_VARIABLE: str(page)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)
        parent.kill()
    # A stopped process reads no end of file: only the kernel can end it.
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), 10, f"process {pid} is gone")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_damaged_file_is_named_and_the_engine_ends(tmp_path: Path, tiny: Tiny) -> None:
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    file = model / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with running(tmp_path, 1) as ranks:
        ranks[0].send(ranks.load_command(0, model))
        told = failure(ranks[0])
        assert told.reason is Reason.MODEL_CORRUPT
        assert file.name in told.message
        assert "weights.py" in told.diagnostics[0]
        assert ranks[0].exit_code() == channel.FAILURE_EXIT_CODE


def test_a_load_that_does_not_fit_the_group_fails_with_the_exception(tmp_path: Path, tiny: Tiny) -> None:
    with running(tmp_path, 1) as ranks:
        ranks[0].send(ranks.load_command(0, tiny("qwen2"), world_size=2))
        told = failure(ranks[0])
        assert told.reason is Reason.LOAD_FAILED
        assert told.message.startswith("ValueError: Load as rank 0 of 2")


class Strangers:
    """Connections to rank 0's frame port by others than its peers."""

    def __init__(self, ranks: Ranks) -> None:
        host = address(ranks.group, 0)
        wait_listening(host, ranks.port, ranks[0].process.pid)
        self.silent = socket.create_connection((host, ranks.port))
        self.talker = socket.create_connection((host, ranks.port))
        self.talker.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(200))
        socket.create_connection((host, ranks.port)).close()

    def close(self) -> None:
        self.silent.close()
        self.talker.close()


def test_strangers_on_the_frame_port_are_harmless_and_a_goodbye_ends_all(tmp_path: Path, tiny: Tiny) -> None:
    with running(tmp_path, 2) as ranks:
        ranks[0].send(ranks.connect_command(0))
        assert ranks[0].expect(channel.WaitingFor).ranks == (1,)
        strangers = Strangers(ranks)
        ranks[1].send(ranks.connect_command(1))
        for rank in ranks.ranks:
            rank.expect(channel.Connected)
        strangers.close()
        ranks.load(tiny("qwen2"))
        ranks.warm_up()
        ranks[0].send(generate("works", PROMPTS[0], 3))
        assert len(ranks[0].answer("works").tokens) == 3
        # As both supervisors do it when the instance is deleted, the worker's first.
        ranks[1].send(channel.Goodbye())
        ranks[0].send(channel.Goodbye())
        assert [rank.exit_code() for rank in ranks.ranks] == [0, 0]
        for rank in ranks.ranks:
            with pytest.raises(UnexpectedError, match="closed its channel"):
                failure(rank)


def test_a_stopped_rank_is_what_the_others_wait_for(pipeline: Ranks) -> None:
    leader, worker = pipeline[0], pipeline[1]
    leader.send(generate("stuck", PROMPTS[0], 2000))
    for _ in range(3):
        leader.expect(channel.Delta)
    worker.process.send_signal(signal.SIGSTOP)
    try:
        read_until_silent(leader)
        snapshot = leader.progress.read()
        assert (snapshot.phase.name, snapshot.waiting_for) == ("WAITING", 1)
    finally:
        worker.process.send_signal(signal.SIGCONT)
    leader.expect(channel.Delta)
    leader.send(channel.Cancel(id="stuck"))
    leader.answer("stuck")


def read_until_silent(rank: Rank) -> None:
    while True:
        try:
            rank.next(1.0)
        except UnexpectedError:
            return
