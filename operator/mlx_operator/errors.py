"""Errors that end the process, and how long to doubt them."""

import asyncio

REFUSAL_SECONDS = 10.0
"""An API server that has just started refuses what it allows a moment later: it has not read all roles and CRDs yet."""


class StartError(Exception):
    """The operator cannot work at all as it is installed; the text is one sentence for a person."""


class HostError(Exception):
    """The host of the watches ended with an error that it does not get over; a new process does."""


class Refusals:
    """Refusals of one thing, one after the other."""

    def __init__(self) -> None:
        self._since: float | None = None

    def final(self) -> bool:
        """Note one; whether they have lasted so long that waiting does not help."""
        now = asyncio.get_running_loop().time()
        if self._since is None:
            self._since = now
        return now - self._since >= REFUSAL_SECONDS

    def clear(self) -> None:
        """What was refused is allowed now."""
        self._since = None
