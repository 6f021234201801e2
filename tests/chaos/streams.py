"""What happens to the events of a watch on their way."""

import json
from collections import Counter, deque
from typing import Any

from aiohttp import web

Event = dict[str, Any]
_KEPT = 8


class Echo:
    """Makes of each event: itself, itself once more, and afterwards an earlier version of its object, as if new."""

    def __init__(self) -> None:
        self._earlier: dict[str, deque[Event]] = {}

    def of(self, event: Event) -> list[Event]:
        """What is to be sent after the event itself."""
        if event["type"] not in ("ADDED", "MODIFIED", "DELETED"):
            return []
        known = self._earlier.setdefault(event["object"]["metadata"]["uid"], deque(maxlen=_KEPT))
        stale = [{"type": "MODIFIED", "object": known[0]["object"]}] if known else []
        known.append(event)
        return [event, *stale]


class Stream:
    """One open watch.

    Args:
        dead: half-open: it stays open and brings nothing.
        cut: its next event breaks off in the middle.
        faults: where what was done is counted.
    """

    def __init__(
        self, request: web.Request, response: web.StreamResponse, *, dead: bool, cut: bool, faults: Counter[str]
    ) -> None:
        self._request = request
        self._response = response
        self._cut = cut
        self._faults = faults
        self.dead = dead
        self.path = request.path

    async def pass_on(self, line: bytes, echo: Echo | None) -> None:
        """Send a line on, or what the faults make of it."""
        if self.dead:
            self._faults["silenced"] += 1
            return
        if self._cut:
            await self._response.write(line[: len(line) // 2])
            self.hang_up()
            return
        await self._response.write(line)
        more = echo.of(json.loads(line)) if echo is not None else []
        for event in more:
            self._faults["echoed"] += 1
            await self._response.write(json.dumps(event).encode() + b"\n")

    def hang_up(self) -> None:
        """Break the connection."""
        if self._request.transport is not None:
            self._request.transport.abort()


def expired() -> bytes:
    """What the API server sends, with status 200, to a watch from a resourceVersion that it no longer knows."""
    status: Event = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Expired"}
    status |= {"code": 410, "message": "too old resource version: 1 (2)"}
    return json.dumps({"type": "ERROR", "object": status}).encode() + b"\n"
