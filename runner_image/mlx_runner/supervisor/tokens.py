"""The bearer token of the control API."""

import hmac

_SCHEME = "bearer"


def authorized(header: str | None, token: str) -> bool:
    """Whether an `Authorization` header carries the token; compared in constant time."""
    scheme, _, given = (header or "").partition(" ")
    return scheme.lower() == _SCHEME and hmac.compare_digest(given.strip().encode(), token.encode())
