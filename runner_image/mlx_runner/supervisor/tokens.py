"""The bearer token of the control API."""

import hmac
import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

WARNING_SECONDS = 60.0
"""One warning in this time: whoever tries tokens must not fill the pod's log."""
_SCHEME = "bearer"


def bearer(header: str | None) -> str:
    """The token of an `Authorization` header; empty where it has none."""
    scheme, _, given = (header or "").partition(" ")
    return given.strip() if scheme.lower() == _SCHEME else ""


def authorized(header: str | None, token: str) -> bool:
    """Whether an `Authorization` header carries the token; compared in constant time."""
    # aiohttp gives bytes that are no UTF-8 as lone surrogates.
    return hmac.compare_digest(bearer(header).encode(errors="surrogateescape"), token.encode())


class Strangers:
    """Whoever asks without the token."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._untold = 0
        self._quiet_until = clock()

    def refused(self, peer: str | None) -> None:
        """A request from an address was refused: tell it, or count it for the next warning."""
        self._untold += 1
        now = self._clock()
        if now < self._quiet_until:
            return
        log.warning(
            f"requests without the right bearer token: {self._untold}, the last from {peer or 'an unknown address'}; "
            f"the next warning comes in {WARNING_SECONDS:g} s at the earliest"
        )
        self._untold = 0
        self._quiet_until = now + WARNING_SECONDS
