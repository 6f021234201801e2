"""Forming a group: who is let in, who is refused, and what is said of it at the deadline. No MLX here."""

import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Peer, Sharding
from mlx_runner import channel, sockets
from mlx_runner.engine import handshake
from mlx_runner.engine.connection import Connection
from mlx_runner.engine.events import Events
from mlx_runner.engine.failures import EngineError
from mlx_runner.engine.group import Former, Group, inbound, outbound

HOSTS = [f"127.55.{os.getpid() % 250}.{os.getpid() // 250 % 60 * 4 + rank + 1}" for rank in range(3)]
"""Of this process: two runs of these tests on one machine do not meet."""
PORT = 18082


def connect(rank: int, world_size: int = 2, **changes: Any) -> channel.Connect:
    command = channel.Connect(
        epoch=4,
        rank=rank,
        world_size=world_size,
        sharding=Sharding.PIPELINE,
        peers=tuple(Peer(rank=r, pod_ip=HOSTS[r], port=PORT) for r in range(world_size)),
        listen_host=HOSTS[rank],
        token="secret",
        deadline=20.0,
    )
    return command.model_copy(update=changes)


Formed = Group | EngineError


def form(*commands: channel.Connect) -> list[Formed]:
    """What becomes of each, formed at the same time."""
    results: list[Formed | None] = [None] * len(commands)

    def one(number: int, command: channel.Connect) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            former = Former(command, Events(ours), lambda peer, why: None)
            try:
                former.listen()
                results[number] = former.form()
            except EngineError as error:
                results[number] = error

    threads = [threading.Thread(target=one, args=item) for item in enumerate(commands)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert None not in results
    return [result for result in results if result is not None]


@contextmanager
def closing(results: list[Formed]) -> Iterator[list[Group]]:
    groups = [result for result in results if isinstance(result, Group)]
    try:
        yield groups
    finally:
        for group in groups:
            ends = [*group.workers.values(), group.leader, group.upstream, group.downstream]
            for end in ends:
                if end is not None:
                    end.close()


def test_every_link_is_dialled_by_exactly_one_of_its_ends() -> None:
    for sharding in Sharding:
        for size in range(2, 6):
            commands = [
                channel.Connect(epoch=1, rank=r, world_size=size, sharding=sharding, peers=(), token="t", deadline=1.0)
                for r in range(size)
            ]
            accepted = {(command.rank, *link) for command in commands for link in inbound(command)}
            dialled = {(peer, command.rank, use) for command in commands for peer, use in outbound(command)}
            assert accepted == dialled
            assert all(listener < dialler for listener, dialler, _ in accepted)


def test_three_ranks_find_each_other_and_the_bytes_go_where_they_should() -> None:
    with closing(form(*(connect(rank, 3) for rank in range(3)))) as groups:
        leader, middle, first = groups
        assert sorted(leader.workers) == [1, 2]
        arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()

        def reader(name: str) -> Callable[[bytearray], None]:
            return lambda message: arrived.put((name, bytes(message)))

        ends: list[tuple[str, Connection | None]] = [
            ("frames-1", middle.leader),
            ("frames-2", first.leader),
            ("hidden-1", middle.upstream),
            ("hidden-0", leader.upstream),
        ]
        for name, end in ends:
            assert end is not None
            end.start(reader(name), 1 << 20)
        assert middle.downstream is not None and first.downstream is not None
        leader.workers[1].send(b"to 1")
        leader.workers[2].send(b"to ", b"2")
        first.downstream.send(b"x" * 300_000)
        middle.downstream.send(b"")
        got = dict(arrived.get(timeout=10) for _ in range(4))
        assert got == {"frames-1": b"to 1", "frames-2": b"to 2", "hidden-1": b"x" * 300_000, "hidden-0": b""}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token": "another"}, "another token"),
        ({"epoch": 5}, "epoch of rank 0 is 4, of rank 1 5"),
        ({"world_size": 3, "peers": connect(0, 3).peers}, "world size of rank 0 is 2, of rank 1 3"),
        ({"model_digest": "sha256:beef"}, "model digest of rank 0 is sha256:cafe, of rank 1 sha256:beef"),
    ],
)
def test_a_rank_that_does_not_fit_is_refused_and_both_say_why_at_the_deadline(
    changes: dict[str, Any], words: str
) -> None:
    # The first is gone when the second tells: its port is closed by then.
    first = connect(0, deadline=1.0, model_digest="sha256:cafe")
    results = form(first, connect(1, **{"deadline": 2.0, **changes}))
    for result, other in zip(results, (1, 0), strict=True):
        assert isinstance(result, EngineError)
        assert result.reason is Reason.CONNECT_TIMEOUT
        assert f"rank {other} at {HOSTS[other]}" in result.message
        assert words in result.message


def test_an_absent_rank_is_named_and_a_present_one_is_not() -> None:
    results = form(connect(0, 3, deadline=2.0), connect(1, 3, deadline=2.0))
    for result in results:
        assert isinstance(result, EngineError)
        assert "waiting for rank 2" in result.message
        assert "rank 1 " not in result.message and "rank 0 " not in result.message


def complaint(result: Formed) -> str:
    assert isinstance(result, EngineError)
    assert result.reason is Reason.CONNECT_TIMEOUT
    return result.message


def test_whether_a_rank_refused_or_accepted_without_a_word_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "SECONDS", 0.3)
    (refused,) = form(connect(1, deadline=1.0))
    assert complaint(refused).endswith(f"rank 0 at {HOSTS[0]}:{PORT} (connection refused)")
    with socket.create_server((HOSTS[0], PORT)):
        (silent,) = form(connect(1, deadline=1.0))
    words = "it accepted a connection, and nothing more came in 0.3 s"
    assert complaint(silent).endswith(f"rank 0 at {HOSTS[0]}:{PORT} ({words})")


def dial(host: str, words: bytes = b"") -> socket.socket:
    """A connection to rank 0 from an address, once rank 0 listens."""
    for _ in range(500):
        try:
            sock = socket.create_connection((HOSTS[0], PORT), timeout=10, source_address=(host, 0))
        except ConnectionRefusedError:
            threading.Event().wait(0.01)
        else:
            sock.sendall(words)
            return sock
    raise AssertionError("rank 0 does not listen")


@pytest.mark.parametrize(
    ("words", "arrived"),
    [
        (b"", "it connected, and nothing more came in 0.3 s"),
        (b"GET / HTTP/1.1\r\n\r\n" * 20, "its connection was refused: it sent 17735 bytes where at most 1024 belong"),
    ],
)
def test_what_arrives_of_a_rank_that_has_to_dial_is_told(
    words: bytes, arrived: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "SECONDS", 0.3)
    results: list[Formed] = []
    thread = threading.Thread(target=lambda: results.extend(form(connect(0, deadline=2.0))))
    thread.start()
    with dial(HOSTS[1], words):
        thread.join(30)
    assert f"rank 1 at {HOSTS[1]} ({arrived})" in complaint(results[0])


def test_a_rank_of_which_nothing_arrives_is_told_so() -> None:
    (result,) = form(connect(0, deadline=0.5))
    assert complaint(result).endswith(f"rank 1 at {HOSTS[1]} (no connection from there has arrived)")


def test_connections_that_arrive_and_are_never_completed_tell_which_way_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seen, words in (
        (frozenset({HOSTS[1]}), "its connections arrive here, the answers to them do not reach it"),
        (None, "no connection of it was accepted"),
    ):
        monkeypatch.setattr(sockets, "half_open", lambda port, seen=seen: seen if port == PORT else None)
        (result,) = form(connect(0, deadline=0.5))
        assert complaint(result).endswith(f"rank 1 at {HOSTS[1]} ({words})")


def test_a_port_in_use_is_told_with_its_address() -> None:
    with socket.create_server((HOSTS[0], PORT)):
        (result,) = form(connect(0))
    assert isinstance(result, EngineError)
    assert result.reason is Reason.CONNECT_FAILED
    assert f"{HOSTS[0]}:{PORT}" in result.message and "in use" in result.message


def test_a_lost_connection_is_told_once_and_names_its_rank() -> None:
    lost: queue.Queue[tuple[int, str]] = queue.Queue()
    ours, theirs = socket.create_server((HOSTS[0], 0)), None
    with ours:
        theirs = socket.create_connection(ours.getsockname())
        accepted, _ = ours.accept()
    connection = Connection(accepted, 7, "frames", lambda peer, why: lost.put((peer, why)))
    connection.start(lambda message: None, 100)
    theirs.sendall(b"\x09\x00\x00\x00half")
    theirs.close()
    peer, why = lost.get(timeout=10)
    assert peer == 7
    assert why == "connection to rank 7 lost (frames): closed after 4 of 9 bytes"
    connection.close()


def test_a_message_that_is_too_long_loses_the_connection_before_it_is_read() -> None:
    lost: queue.Queue[str] = queue.Queue()
    with socket.create_server((HOSTS[0], 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    connection = Connection(accepted, 1, "frames", lambda peer, why: lost.put(why))
    connection.start(lambda message: None, 100)
    theirs.sendall(b"\xff\xff\xff\xff")
    assert "4294967295 bytes, more than 100" in lost.get(timeout=10)
    theirs.close()
    connection.close()


def shake(dialled: Callable[[socket.socket], None]) -> Exception | handshake.Hello:
    """The listener's verdict on what `dialled` does."""
    mine = handshake.Hello(epoch=4, rank=0, world_size=2, sharding=Sharding.PIPELINE, purpose="frames")
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(5)
        thread = threading.Thread(target=dialled, args=(theirs,))
        thread.start()
        try:
            return handshake.listen(ours, "secret", mine)
        except (handshake.StrangerError, handshake.RefusedError, EOFError, OSError) as error:
            return error
        finally:
            thread.join(5)
            theirs.close()


def test_an_answer_cannot_be_used_a_second_time() -> None:
    theirs = handshake.Hello(epoch=4, rank=1, world_size=2, sharding=Sharding.PIPELINE, purpose="frames")

    class Recorder:
        """A dialer's socket that keeps what it sent."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock, self.sent = sock, b""

        def recv_into(self, view: Any) -> int:
            return self.sock.recv_into(view)

        def sendall(self, data: bytes) -> None:
            self.sent += data
            self.sock.sendall(data)

    recorded: list[bytes] = []

    def honest(sock: socket.socket) -> None:
        recorder = Recorder(sock)
        handshake.dial(recorder, "secret", theirs)  # type: ignore[arg-type]
        recorded.append(recorder.sent)

    assert shake(honest) == theirs
    replayed = shake(lambda sock: sock.sendall(recorded[0]))
    assert isinstance(replayed, handshake.StrangerError)
    assert "another token" in str(replayed)


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n" * 20, bytes(500), b"\xff" * 500])
def test_noise_is_no_rank(noise: bytes) -> None:
    def make(sock: socket.socket) -> None:
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)

    assert isinstance(shake(make), handshake.StrangerError | EOFError)
