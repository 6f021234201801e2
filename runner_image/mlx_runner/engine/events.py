"""Words of the engine to its supervisor: one JSON line each, from any thread."""

import os
import socket
import struct
import threading
from contextlib import suppress

from mlx_runner.channel import FAILURE_EXIT_CODE, Event, Notice, encode


class Events:
    """Writes events whole: threads never mix their lines."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def send(self, event: Event) -> None:
        """Write one event. Without a supervisor nobody needs this process: it ends."""
        line = encode(event)
        try:
            with self._lock:
                self._channel.sendall(line)
        except OSError:
            os._exit(FAILURE_EXIT_CODE)

    def send_last(self, event: Event, seconds: float) -> None:
        """Write one event before the process ends; a supervisor that does not read is waited for so long.

        Only that wait is bounded: where there is room the event is written, however slow this machine is.
        """
        line = encode(event)
        if not self._lock.acquire(timeout=seconds):
            return  # another thread waits for that supervisor
        whole, fraction = divmod(seconds, 1.0)
        limit = struct.pack("ll", int(whole), int(fraction * 1e6))
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        with suppress(OSError):
            self._channel.sendall(line)

    def notice(self, text: str, *, warning: bool = False) -> None:
        """One line for the pod's log."""
        self.send(Notice(level="warning" if warning else "info", text=text))
