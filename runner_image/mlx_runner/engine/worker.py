"""Ranks > 0: receive a frame, compute, receive the next one. Nothing is decided here.

The frames are read by the connection's thread, so that this rank sees rank 0's goodbye (or its death) also while it
computes; while there is no frame it sleeps.
"""

import queue
import threading
from collections.abc import Callable

from mlx_runner.progress import Phase, Progress

from . import frames
from .failures import Ending
from .forward import Executor
from .frames import Frame, FrameError
from .group import Group

_LEADER = 0
_LEADER_SECONDS = 2.0
"""After a goodbye rank 0 closes its end last; this is for one that was killed meanwhile."""


class WarmUpGate:
    """Answers the supervisor's warm-up when both have come: its command, and rank 0's word that it is done."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._asked = False
        self._done = False

    def asked(self) -> None:
        """The supervisor wants to know."""
        self._open(asked=True)

    def done(self) -> None:
        """Rank 0 is done."""
        self._open(done=True)

    def _open(self, *, asked: bool = False, done: bool = False) -> None:
        with self._lock:
            self._asked |= asked
            self._done |= done
            answer = self._asked and self._done
            if answer:
                self._asked = False
        if answer:
            self._say()


class Worker:
    """The loop of the main thread of a rank > 0."""

    def __init__(self, group: Group, progress: Progress, ending: Ending, gate: WarmUpGate) -> None:
        if group.leader is None:
            raise ValueError(f"rank {group.rank} has no connection to rank 0")
        self._epoch = group.epoch
        self._leader = group.leader
        self._progress = progress
        self._ending = ending
        self._gate = gate
        self._arrived: queue.SimpleQueue[Frame | FrameError] = queue.SimpleQueue()
        self._sequence = 0

    def listen(self) -> None:
        """Read frames from now on (they wait until `run`), and notice the end of rank 0."""
        self._leader.start(self._receive, frames.MAX_BYTES)

    def _receive(self, raw: bytearray) -> None:
        try:
            frame = frames.decode(raw)
        except FrameError as error:
            self._arrived.put(error)
            return
        if any(isinstance(operation, frames.Goodbye) for operation in frame.operations):
            self._leave()
        self._arrived.put(frame)

    def _leave(self) -> None:
        # Answered before anybody ends: the other ranks then know that lost connections are no failure.
        self._ending.start_leaving()
        self._leader.send(frames.GOODBYE_ANSWER)
        threading.Thread(target=self._end, name="goodbye", daemon=True).start()

    def _end(self) -> None:
        self._leader.wait_closed(_LEADER_SECONDS)
        self._ending.leave()

    def run(self, executor: Executor) -> None:
        """Serve frames for ever.

        Raises:
            FrameError: a frame that does not belong here.
        """
        while True:
            if executor.busy:
                self._progress.write(Phase.WAITING, waiting_for=_LEADER)
            else:
                self._progress.write(Phase.IDLE)
            frame = self._arrived.get()
            if isinstance(frame, FrameError):
                raise frame
            self._check(frame)
            self._progress.write(Phase.COMPUTING)
            executor.run(frame)
            self._progress.holds(executor.rows, executor.cache_bytes)
            tokens = len(frame.step.tokens) if frame.step else 0
            self._progress.write(Phase.COMPUTING, steps=1, tokens=tokens)
            if any(isinstance(operation, frames.WarmedUp) for operation in frame.operations):
                self._gate.done()

    def _check(self, frame: Frame) -> None:
        self._sequence += 1
        if (frame.epoch, frame.sequence) != (self._epoch, self._sequence):
            raise FrameError(
                f"frame {frame.sequence} of epoch {frame.epoch}, expected {self._sequence} of {self._epoch}"
            )
