"""What the API server saw: its audit log, never our own counting."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


@dataclass(frozen=True)
class Request:
    """One finished request."""

    time: datetime
    """When the API server had answered it."""
    verb: str
    user: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int
    body: dict[str, Any] | None


def requests(log: Path, offset: int = 0) -> Iterator[Request]:
    """Finished requests in the log from a byte offset on."""
    with log.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written
            event = json.loads(line)
            if event.get("stage") != "ResponseComplete":
                continue
            target = event.get("objectRef") or {}
            yield Request(
                time=datetime.fromisoformat(event["stageTimestamp"]),
                verb=event["verb"],
                user=event.get("user", {}).get("username", ""),
                resource=target.get("resource", ""),
                subresource=target.get("subresource", ""),
                namespace=target.get("namespace", ""),
                name=target.get("name", ""),
                code=event.get("responseStatus", {}).get("code", 0),
                body=event.get("requestObject"),
            )


def operator_writes(log: Path, offset: int, user: str) -> list[Request]:
    """Writes of the operator, Lease renewals aside."""
    return [r for r in requests(log, offset) if r.user == user and r.verb in WRITES and r.resource != "leases"]


def status_writes(log: Path, namespace: str, name: str, offset: int = 0) -> list[Request]:
    """Successful status writes of one instance."""
    return [
        r
        for r in requests(log, offset)
        if r.resource == "modelinstances"
        and r.subresource == "status"
        and r.namespace == namespace
        and r.name == name
        and r.verb in WRITES
        and r.code == 200
    ]
