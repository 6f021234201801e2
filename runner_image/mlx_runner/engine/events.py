"""Words of the engine to its supervisor: one JSON line each, from any thread."""

import os
import socket
import threading

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

    def notice(self, text: str, *, warning: bool = False) -> None:
        """One line for the pod's log."""
        self.send(Notice(level="warning" if warning else "info", text=text))
