"""Forming the group of an epoch: who listens, who dials, and whom a rank still waits for.

The lower rank listens on its frame port, the higher dials: rank 0 has a frame connection to every other rank, and in a
pipeline rank r has one to rank r + 1 for hidden states.
"""

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import Peer, Sharding
from mlx_runner import sockets
from mlx_runner.channel import Connect, WaitingFor

from . import handshake
from .connection import Connection
from .events import Events
from .failures import EngineError
from .handshake import Hello, Purpose

_RETRY_SECONDS = 0.1
_DIAL_SECONDS = 2.0
_MAX_HANDSHAKES = 64
"""At a time; further connections are closed unanswered."""

_NO_ANSWER = f"neither accepted nor refused within {_DIAL_SECONDS:g} s"

Link = tuple[int, Purpose]


@dataclass(slots=True)
class Group:
    """The connections of this rank, by what they are for."""

    epoch: int
    rank: int
    world_size: int
    sharding: Sharding
    workers: dict[int, Connection] = field(default_factory=dict)
    """Rank 0: frames to each other rank."""
    leader: Connection | None = None
    """Ranks > 0: frames from rank 0."""
    upstream: Connection | None = None
    """Pipeline: hidden states from rank + 1."""
    downstream: Connection | None = None
    """Pipeline: hidden states to rank - 1."""


def inbound(connect: Connect) -> set[Link]:
    """The connections that others dial to this rank."""
    links: set[Link] = set()
    if connect.rank == 0:
        links |= {(peer, "frames") for peer in range(1, connect.world_size)}
    if connect.sharding is Sharding.PIPELINE and connect.rank < connect.world_size - 1:
        links.add((connect.rank + 1, "hidden"))
    return links


def outbound(connect: Connect) -> set[Link]:
    """The connections that this rank dials."""
    links: set[Link] = set()
    if connect.rank > 0:
        links.add((0, "frames"))
        if connect.sharding is Sharding.PIPELINE:
            links.add((connect.rank - 1, "hidden"))
    return links


class Former:
    """Forms the group of one `Connect`. Used once."""

    def __init__(self, connect: Connect, events: Events, on_lost: Callable[[int, str], None]) -> None:
        self._connect = connect
        self._events = events
        self._on_lost = on_lost
        # A little before the supervisor's own deadline: this side can say why.
        self._deadline = time.monotonic() + connect.deadline - min(1.0, connect.deadline * 0.1)
        self._missing = inbound(connect) | outbound(connect)
        self._made: dict[Link, socket.socket] = {}
        self._why: dict[int, str] = {}
        """What became of the last attempt to dial a rank."""
        self._heard: dict[str, str] = {}
        """The same of connections from an address."""
        self._answered: set[int] = set()
        self._strangers: list[str] = []
        self._told: tuple[int, ...] = ()
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._slots = threading.Semaphore(_MAX_HANDSHAKES)
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """Open the frame port, if anybody dials this rank.

        Raises:
            EngineError: the port cannot be opened.
        """
        if not inbound(self._connect):
            return
        host, port = self._connect.listen_host, self._connect.peers[self._connect.rank].port
        try:
            # SO_REUSEADDR is set by it: connections of the last epoch in TIME_WAIT are no obstacle.
            self._listener = socket.create_server((host, port), backlog=self._connect.world_size + 16)
        except OSError as error:
            message = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise EngineError(Reason.CONNECT_FAILED, message) from error

    def announce(self, *also: int) -> None:
        """Say for whom this rank waits (and for whom `also`), if that changed."""
        with self._changed:
            self._announce(*also)

    def form(self) -> Group:
        """Connect to everybody.

        Raises:
            EngineError: not all connections stood at the deadline.
        """
        self.announce()
        if self._listener is not None:
            threading.Thread(target=self._accept, args=(self._listener,), name="accept", daemon=True).start()
        for link in outbound(self._connect):
            threading.Thread(target=self._dial, args=link, name=f"dial-{link[0]}", daemon=True).start()
        try:
            self._wait()
        except EngineError:
            for sock in self._made.values():
                sock.close()
            raise
        finally:
            self._over.set()
            if self._listener is not None:
                _cut(self._listener)  # wakes the thread in accept, which closes it
        return self._group()

    def _wait(self) -> None:
        with self._changed:
            while self._missing:
                remaining = self._deadline - time.monotonic()
                if remaining <= 0 or not self._changed.wait(remaining):
                    break
            if self._missing:
                raise EngineError(Reason.CONNECT_TIMEOUT, self._complaint())

    def _complaint(self) -> str:
        ranks = ", ".join(self._describe(rank) for rank in self._waiting_for())
        strangers = f"; refused: {'; '.join(self._strangers)}" if self._strangers else ""
        return f"not connected within {self._connect.deadline:g} s: still waiting for {ranks}{strangers}"

    def _describe(self, rank: int) -> str:
        peer = self._connect.peers[rank]
        if any(link in self._missing for link in outbound(self._connect) if link[0] == rank):
            return f"rank {rank} at {peer.pod_ip}:{peer.port} ({self._why.get(rank, 'no answer')})"
        return f"rank {rank} at {peer.pod_ip} ({self._arrived(peer.pod_ip)})"

    def _arrived(self, address: str) -> str:
        """What is seen here of a rank that has to dial: a silent one is told from a way that leads one way only."""
        if address in self._heard:
            return self._heard[address]
        half_open = sockets.half_open(self._connect.peers[self._connect.rank].port)
        if half_open is None:
            return "no connection of it was accepted"
        if address in half_open:
            return "its connections arrive here, the answers to them do not reach it"
        return "no connection from there has arrived"

    def _waiting_for(self) -> tuple[int, ...]:
        return tuple(sorted({rank for rank, _ in self._missing}))

    def _announce(self, *also: int) -> None:
        waiting = tuple(sorted({*self._waiting_for(), *also}))
        if waiting != self._told:
            self._told = waiting
            self._events.send(WaitingFor(ranks=waiting))

    def _hello(self, purpose: Purpose) -> Hello:
        return Hello(
            epoch=self._connect.epoch,
            rank=self._connect.rank,
            world_size=self._connect.world_size,
            sharding=self._connect.sharding,
            purpose=purpose,
            model_digest=self._connect.model_digest,
        )

    # -- the listener's side
    def _accept(self, listener: socket.socket) -> None:
        while not self._over.is_set():
            try:
                sock, address = listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    break  # the group is formed, or given up
                self._forget(None, f"a connection that could not be accepted: {(error.strerror or '').lower()}")
                self._over.wait(_RETRY_SECONDS)
                continue
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(sock, address[0]), name="greet", daemon=True).start()
            else:
                sock.close()
        listener.close()

    def _greet(self, sock: socket.socket, address: str) -> None:
        began = time.monotonic()
        try:
            with _bounded(sock):
                hello = handshake.listen(sock, self._connect.token, self._hello("frames"))
        except (handshake.StrangerError, handshake.RefusedError) as error:
            self._heard[address] = f"its connection was refused: {error}"
            self._forget(sock, f"{address}: {error}")
        except (EOFError, OSError) as error:
            # A probe or a port scan; or a rank whose words do not come through.
            self._heard[address] = f"it connected, {_broken(error, began)}"
            sock.close()
        else:
            self._take((hello.rank, hello.purpose), sock)
        finally:
            self._slots.release()

    def _forget(self, sock: socket.socket | None, why: str) -> None:
        if sock is not None:
            sock.close()
        with self._changed:
            if why in self._strangers:
                return
            self._strangers = [*self._strangers, why][-3:]
        self._events.notice(f"connection refused: {why}", warning=True)

    # -- the dialer's side
    def _dial(self, rank: int, purpose: Purpose) -> None:
        peer = self._connect.peers[rank]
        while not self._over.is_set():
            sock = self._try(peer, purpose)
            if sock is not None:
                self._take((rank, purpose), sock)
                return
            self._over.wait(_RETRY_SECONDS)

    def _try(self, peer: Peer, purpose: Purpose) -> socket.socket | None:
        try:
            sock = socket.create_connection((peer.pod_ip, peer.port), timeout=_DIAL_SECONDS)
        except OSError as error:
            # An answer in a handshake says more than a port that is closed, or closes, before or after it.
            if peer.rank not in self._answered:
                silent = isinstance(error, TimeoutError)
                self._why[peer.rank] = _NO_ANSWER if silent else (error.strerror or str(error)).lower()
            return None
        began = time.monotonic()
        try:
            with _bounded(sock):
                handshake.dial(sock, self._connect.token, self._hello(purpose))
            return sock
        except (handshake.StrangerError, handshake.RefusedError) as error:
            self._answered.add(peer.rank)
            self._why[peer.rank] = str(error)
        except (EOFError, OSError) as error:
            if peer.rank not in self._answered:
                self._why[peer.rank] = f"it accepted a connection, {_broken(error, began)}"
        sock.close()
        return None

    def _take(self, link: Link, sock: socket.socket) -> None:
        with self._changed:
            expected = link in self._missing or link in self._made
            if not expected or self._over.is_set():
                sock.close()
                return
            # The same rank again: its dialer gave up on an answer that came late. The newer one counts.
            older = self._made.pop(link, None)
            if older is not None:
                older.close()
            self._made[link] = sock
            self._missing.discard(link)
            self._announce()
            self._changed.notify_all()

    def _group(self) -> Group:
        connect = self._connect
        group = Group(connect.epoch, connect.rank, connect.world_size, connect.sharding)
        for (rank, purpose), sock in self._made.items():
            connection = Connection(sock, rank, purpose, self._on_lost)
            if purpose == "frames" and connect.rank == 0:
                group.workers[rank] = connection
            elif purpose == "frames":
                group.leader = connection
            elif rank > connect.rank:
                group.upstream = connection
            else:
                group.downstream = connection
        return group


def _broken(error: Exception, began: float) -> str:
    """How a handshake that began then ended without an end."""
    if time.monotonic() - began >= handshake.SECONDS * 0.9:
        return f"and nothing more came in {handshake.SECONDS:g} s"
    why = error.strerror if isinstance(error, OSError) else None
    return f"and the handshake broke off: {(why or str(error)).lower()}"


class _bounded(contextlib.AbstractContextManager[None]):  # noqa: N801 (reads as a statement)
    """A handshake ends in time, also against somebody who sends one byte at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._timer = threading.Timer(handshake.SECONDS, _cut, (sock,))
        self._timer.daemon = True
        sock.settimeout(handshake.SECONDS)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
