"""What can go wrong with a hub, request by request."""

import re
from enum import StrEnum

from pydantic import BaseModel


class Kind(StrEnum):
    """One fault each."""

    STATUS = "status"
    """The answer is `status`, with `error_code` and `retry_after` where given."""
    RESET = "reset"
    """The connection is reset after `after` bytes of the body."""
    STALL = "stall"
    """No byte comes any more after `after` bytes of the body; the connection stays open."""
    TRUNCATED = "truncated"
    """The file ends `cut` bytes early, and the answer says so: a hub whose content does not fit to its list."""
    CORRUPT = "corrupt"
    """One byte of the file is another one."""
    NO_RANGES = "no ranges"
    """A request for a part is answered with the whole."""
    NO_JSON = "no json"
    """A page of a proxy instead of the answer."""


class Fault(BaseModel):
    """Applied to the next `times` requests whose path matches; a later fault goes first."""

    kind: Kind
    path: str = ""
    """Regular expression, searched in the path."""
    times: int = 1_000_000
    status: int = 503
    error_code: str | None = None
    retry_after: str | None = None
    after: int = 0
    cut: int = 1

    def matches(self, path: str) -> bool:
        return self.times > 0 and re.search(self.path, path) is not None
