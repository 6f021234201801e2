"""Who may use the public API: keys from a file, one a line, read again when the file changes."""

import hmac
import logging
import os
from pathlib import Path

from .openai_errors import ApiError
from .tokens import bearer

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20
"""Of a Secret; a larger file is none."""
_Stamp = tuple[int, int, int]


class ApiKeys:
    """The keys of a file. With no file configured everybody is let in; with one that cannot be read, nobody."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: _Stamp | None = None
        self._keys: tuple[bytes, ...] = ()

    def check(self, header: str | None) -> None:
        """Let a request in by its `Authorization` header.

        Raises:
            ApiError: 401, it carries none of the keys; 503, the keys cannot be read.
        """
        if self._path is None:
            return
        self._refresh(self._path)
        given = bearer(header)
        # Every key is compared, in constant time each: how long it takes says nothing about them.
        found = [hmac.compare_digest(given.encode(errors="surrogateescape"), key) for key in self._keys]
        if given and any(found):
            return
        if header is None:
            message = "You didn't provide an API key: send it in the header 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="missing_api_key")
        raise ApiError(401, "Incorrect API key provided", code="invalid_api_key")

    def _refresh(self, path: Path) -> None:
        """The kubelet swaps a link when a Secret changes: another inode, time or size."""
        try:
            found = os.stat(path)
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp != self._stamp:
                self._keys, self._stamp = _read(path), stamp
                log.info("%d API keys read from %s", len(self._keys), path)
        except OSError as error:
            self._keys, self._stamp = (), None
            log.warning("the API keys cannot be read: %s", error)
            raise ApiError(503, "the API keys of this endpoint cannot be read", code="api_keys_unreadable") from error


def _read(path: Path) -> tuple[bytes, ...]:
    with path.open("rb") as file:
        lines = file.read(MAX_FILE_BYTES).splitlines()
    return tuple(key for line in lines if (key := line.strip()))
