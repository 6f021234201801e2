"""The one way out when something broke: report the failure, then end the process.

An engine never tries to go on after a failure in its group: after an error in one of MLX's collectives the next one
may hang for ever, and cleaning up in order (`sys.exit`, joins, destructors) may hang as well.
"""

import logging
import os
import threading
import traceback
from typing import NoReturn

from mlx_operator_api.conditions import Reason
from mlx_runner.channel import FAILURE_EXIT_CODE, Failure

from .events import Events

log = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 2.0
"""For the supervisor to take the report; then the process ends without it."""


class EngineError(Exception):
    """A failure whose reason is known. `peer` is the accused rank."""

    def __init__(self, reason: Reason, message: str, *, peer: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.peer = peer


def describe(error: BaseException, fallback: Reason) -> Failure:
    """A report of an exception; `fallback` is the reason of one that does not carry its own."""
    diagnostics = tuple(_locations(error))
    if isinstance(error, EngineError):
        return Failure(reason=error.reason, message=error.message, peer=error.peer, diagnostics=diagnostics)
    first = str(error).strip().split("\n")[0]
    name = type(error).__name__
    return Failure(reason=fallback, message=f"{name}: {first}" if first else name, diagnostics=diagnostics)


def _locations(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in reversed(frames)]


class Ending:
    """Ends the process. Several threads may notice the same death: the first report counts."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._first = threading.Lock()
        self._leaving = threading.Event()

    @property
    def leaving(self) -> bool:
        """Whether the group is being dissolved in good order, so that lost connections are expected."""
        return self._leaving.is_set()

    def start_leaving(self) -> None:
        """From now on a lost connection is no failure."""
        self._leaving.set()

    def fail(self, failure: Failure) -> NoReturn:
        """Report and end. A second caller waits for the end that the first one brings."""
        if not self._first.acquire(blocking=False):
            threading.Event().wait()
        self._events.send_last(failure, _LAST_WORDS_SECONDS)
        os._exit(FAILURE_EXIT_CODE)

    def lose(self, peer: int, why: str) -> None:
        """A connection to `peer` is gone: the epoch is over, unless the group is leaving."""
        if self.leaving:
            return
        self.fail(Failure(reason=Reason.PEER_LOST, message=why, peer=peer))

    def leave(self) -> NoReturn:
        """End in good order."""
        os._exit(0)
