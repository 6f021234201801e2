"""What an engine says before it ends reaches its supervisor, and a supervisor that does not read cannot hold it."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from mlx_operator_api.conditions import Reason
from mlx_runner.channel import Failure, Notice, decode_event
from mlx_runner.engine.events import Events

LOST = Failure(reason=Reason.PEER_LOST, message="connection to rank 1 lost", peer=1)
BRIEF = 0.2
PATIENCE = 20.0


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def fill(sock: socket.socket) -> None:
    """Until nothing more fits."""
    sock.setblocking(False)
    try:
        while True:
            sock.send(b"x" * 4096)
    except BlockingIOError:
        sock.setblocking(True)


def test_the_last_word_is_written_however_little_time_there_is(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    Events(ours).send_last(LOST, 1e-6)
    assert decode_event(theirs.recv(4096)) == LOST


def test_a_supervisor_that_does_not_read_holds_the_last_word_for_a_while_only(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, _ = ends
    fill(ours)
    began = time.monotonic()
    Events(ours).send_last(LOST, BRIEF)
    assert BRIEF * 0.9 < time.monotonic() - began < PATIENCE


def test_a_thread_that_is_stuck_in_a_word_of_its_own_does_not_hold_the_last_one(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    fill(ours)
    events = Events(ours)
    stuck = threading.Thread(target=events.send, args=(Notice(level="info", text="x" * 4096),), daemon=True)
    stuck.start()
    deadline = time.monotonic() + PATIENCE
    while not events._lock.locked() and time.monotonic() < deadline:
        stuck.join(0.01)
    began = time.monotonic()
    events.send_last(LOST, BRIEF)
    assert BRIEF * 0.9 < time.monotonic() - began < PATIENCE
    assert stuck.is_alive()
    while stuck.is_alive():
        theirs.recv(1 << 20)
        stuck.join(0.001)
