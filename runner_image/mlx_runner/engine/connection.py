"""A connection between two ranks: messages with a length in front, read by a thread of its own.

The thread keeps the socket drained while the main thread computes (so the kernel never sees a closed window for
longer than its timeout), and it is what notices, at any moment, that the peer is gone.
"""

import socket
import struct
import threading
from collections.abc import Callable

_LENGTH = struct.Struct("<I")
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
_USER_TIMEOUT_MS = 5000
"""A partition is an error after 5 s instead of never: keepalive while idle, this while data is in flight."""
_SMALL = 64 * 1024
"""Up to here one packet train with its header beats a second system call."""


def tune(sock: socket.socket) -> None:
    """Make a socket notice a silent peer, and send small messages at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def read_exactly(sock: socket.socket, count: int) -> bytearray:
    """Read `count` bytes.

    Raises:
        EOFError: the peer closed the connection first.
        OSError: the connection broke.
    """
    data = bytearray(count)
    view = memoryview(data)
    done = 0
    while done < count:
        got = sock.recv_into(view[done:])
        if got == 0:
            raise EOFError(f"closed after {done} of {count} bytes")
        done += got
    return data


class Connection:
    """A connection to `peer` that has shaken hands. `on_lost(peer, why)` is called once, from any thread."""

    def __init__(self, sock: socket.socket, peer: int, purpose: str, on_lost: Callable[[int, str], None]) -> None:
        sock.settimeout(None)
        tune(sock)
        self.peer = peer
        self._sock = sock
        self._purpose = purpose
        self._on_lost = on_lost
        self._answered = threading.Event()
        self._closed = threading.Event()

    def start(self, on_message: Callable[[bytearray], None], max_bytes: int) -> None:
        """Read messages of at most `max_bytes` into `on_message`, in a thread."""
        name = f"{self._purpose}-from-{self.peer}"
        threading.Thread(target=self._read, args=(on_message, max_bytes), name=name, daemon=True).start()

    def send(self, *parts: bytes | memoryview) -> None:
        """Send one message made of `parts`. Blocks while the peer's buffers are full; a lost peer ends the engine."""
        header = _LENGTH.pack(sum(len(part) for part in parts))
        try:
            if sum(len(part) for part in parts) <= _SMALL:
                self._sock.sendall(b"".join((header, *parts)))
            else:
                self._sock.sendall(header)
                for part in parts:
                    self._sock.sendall(part)
        except OSError as error:
            self._lose(f"{error.strerror or error}")

    def expect_answer(self) -> None:
        """Read the one message that the peer sends on this connection, and notice its end, in a thread."""
        self.start(lambda _: self._answered.set(), _SMALL)

    def wait_answer(self, seconds: float) -> None:
        """Wait for that message, or until the peer has closed its end."""
        self._answered.wait(seconds)

    def wait_closed(self, seconds: float) -> None:
        """Wait until the peer has closed its end."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Close it without a word."""
        self._sock.close()

    def _read(self, on_message: Callable[[bytearray], None], max_bytes: int) -> None:
        try:
            while True:
                (length,) = _LENGTH.unpack(read_exactly(self._sock, _LENGTH.size))
                if length > max_bytes:
                    self._lose(f"message of {length} bytes, more than {max_bytes}")
                    return
                on_message(read_exactly(self._sock, length))
        except EOFError as error:
            self._end(str(error))
        except OSError as error:
            self._end(f"{error.strerror or error}")

    def _end(self, why: str) -> None:
        self._answered.set()
        self._closed.set()
        self._lose(why)

    def _lose(self, why: str) -> None:
        self._on_lost(self.peer, f"connection to rank {self.peer} lost ({self._purpose}): {why}")
