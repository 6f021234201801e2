"""Trying again: with a wait that doubles, or as long as the other side asks for; the supervisor's deadline ends it."""

import time
from collections.abc import Callable
from typing import TypeVar

from . import result
from .faults import TransientError
from .report import Say

FIRST_SECONDS = 0.5
MAX_SECONDS = 30.0
MAX_ASKED_SECONDS = 300.0
"""Longest wait that another side can ask for: what it knew may change."""
T = TypeVar("T")


class Patience:
    """One for each thing that is tried."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._wait = FIRST_SECONDS

    def renew(self) -> None:
        """Something was achieved: the next wait is a short one again."""
        self._wait = FIRST_SECONDS

    def wait(self, error: TransientError) -> None:
        """Say what happened and wait."""
        seconds = max(self._wait, min(error.seconds, MAX_ASKED_SECONDS))
        self._wait = min(self._wait * 2, MAX_SECONDS)
        self._say(result.Trouble(what=error.what, seconds=seconds))
        time.sleep(seconds)

    def until_done(self, attempt: Callable[[], T]) -> T:
        """Try until it works, or fails with what is no `TransientError`."""
        while True:
            try:
                return attempt()
            except TransientError as error:
                self.wait(error)
