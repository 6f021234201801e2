"""Hidden states between the stages of a pipeline: raw bytes over TCP, each message with its shape in front."""

import queue
import struct
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from .connection import Connection

MAX_BYTES = 1024 * 1024 * 1024
_HEADER = struct.Struct("<QIIII8x")
"""Sequence, rows, positions, hidden size, type; 32 bytes, so that the data behind it is aligned."""
# numpy has no bfloat16: its bits travel as uint16.
_TYPES = ((mx.float32, np.float32), (mx.bfloat16, np.uint16), (mx.float16, np.uint16))


class HiddenError(Exception):
    """What came is not what the frame announced: the two ranks are out of step."""


class HiddenOut:
    """To the rank below."""

    def __init__(self, connection: Connection, waiting: Callable[[int], None], computing: Callable[[], None]) -> None:
        self._connection = connection
        self._sequence = 0
        self._waiting = waiting
        self._computing = computing

    def send(self, hidden: Any) -> None:
        """Evaluate and send hidden states (rows, positions, hidden)."""
        kind = [mlx_type for mlx_type, _ in _TYPES].index(hidden.dtype)
        raw = hidden if hidden.dtype == mx.float32 else hidden.view(mx.uint16)
        raw = mx.contiguous(raw)
        mx.eval(raw)
        data = np.asarray(raw).data.cast("B")
        self._sequence += 1
        self._waiting(self._connection.peer)
        self._connection.send(_HEADER.pack(self._sequence, *hidden.shape, kind), data)
        self._computing()


class HiddenIn:
    """From the rank above."""

    def __init__(self, connection: Connection, waiting: Callable[[int], None], computing: Callable[[], None]) -> None:
        self._peer = connection.peer
        self._arrived: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._sequence = 0
        self._waiting = waiting
        self._computing = computing
        connection.start(self._arrived.put, MAX_BYTES)

    def receive(self, rows: int, positions: int) -> Any:
        """The next hidden states, (rows, positions, hidden). A lost peer ends the engine meanwhile.

        Raises:
            HiddenError: another message than the one of this turn.
        """
        self._waiting(self._peer)
        message = self._arrived.get()
        self._computing()
        self._sequence += 1
        sequence, their_rows, their_positions, size, kind = _HEADER.unpack_from(message)
        if (sequence, their_rows, their_positions) != (self._sequence, rows, positions) or kind >= len(_TYPES):
            raise HiddenError(
                f"rank {self._peer} sent hidden states {sequence} of {their_rows}x{their_positions}, "
                f"expected {self._sequence} of {rows}x{positions}"
            )
        mlx_type, numpy_type = _TYPES[kind]
        data = np.frombuffer(message, dtype=numpy_type, offset=_HEADER.size).reshape(rows, positions, size)
        array = mx.array(data)
        return array if mlx_type == mx.float32 else array.view(mlx_type)
