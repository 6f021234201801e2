"""Reading the API server's audit log: what tests count writes with, instead of trusting the writer."""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHUNK = 1 << 16
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


@dataclass(frozen=True)
class Request:
    """One finished request.

    Attributes:
        verb: Kubernetes' verb, such as ``patch``.
        user: who sent it.
        resource: plural with subresource, such as ``modelinstances/status``; empty for other paths.
        namespace: empty for cluster-wide objects.
        name: empty for a list or a create with a generated name.
        code: HTTP status.
        at: when it was received, RFC 3339.
        agent: the client's user agent.
        path: the request's path.
        answered: when the API server had answered it, RFC 3339.
        body: what was sent, for writes of ModelInstances and Events; None elsewhere.
        causes: why it was refused, in the API's words such as ``NamespaceTerminating``.
    """

    verb: str
    user: str
    resource: str
    namespace: str
    name: str
    code: int
    at: str
    agent: str
    path: str
    answered: str = ""
    body: dict[str, Any] | None = None
    causes: frozenset[str] = frozenset()


class AuditLog:
    """The audit log of one API server.

    Args:
        path: the log file, as ``Cluster.audit_log`` or ``ApiServer.audit_log`` say it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self) -> int:
        """Return the place after the last event, to read on from later."""
        if not self.path.exists():
            return 0
        # The last line may still be in the making: a mark inside it would be no place to read on from.
        with self.path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                begin = max(0, end - _CHUNK)
                file.seek(begin)
                found = file.read(end - begin).rfind(b"\n")
                if found >= 0:
                    return begin + found + 1
                end = begin
        return 0

    def requests(
        self,
        since: int = 0,
        *,
        verbs: Collection[str] | None = None,
        resources: Collection[str] | None = None,
        user: str | None = None,
    ) -> list[Request]:
        """Return the requests that finished after a mark.

        Args:
            since: a mark.
            verbs: only these verbs.
            resources: only these resources, such as ``pods`` or ``modelinstances/status``.
            user: only this user, such as ``system:serviceaccount:NAMESPACE:NAME``.
        """
        found = []
        with self.path.open("rb") as file:
            file.seek(since)
            for line in file:
                # The last line may still be in the making.
                if line.endswith(b"\n"):
                    found.append(_request(json.loads(line)))
        return [
            request
            for request in found
            if (verbs is None or request.verb in verbs)
            and (resources is None or request.resource in resources)
            and (user is None or request.user == user)
        ]

    def writes(self, since: int = 0, *, user: str | None = None, leases: bool = False) -> list[Request]:
        """Return the writes that finished after a mark.

        Args:
            since: a mark.
            user: only this user.
            leases: include renewals of Leases, which every leader sends all the time.
        """
        found = self.requests(since, verbs=WRITES, user=user)
        return found if leases else [request for request in found if request.resource != "leases"]


def _request(event: dict[str, Any]) -> Request:
    target, answer = event.get("objectRef", {}), event.get("responseStatus", {})
    resource = "/".join(part for part in (target.get("resource", ""), target.get("subresource", "")) if part)
    return Request(
        verb=event.get("verb", ""),
        user=event.get("user", {}).get("username", ""),
        resource=resource,
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        code=int(answer.get("code", 0)),
        at=event.get("requestReceivedTimestamp", ""),
        agent=event.get("userAgent", ""),
        path=event.get("requestURI", ""),
        answered=event.get("stageTimestamp", ""),
        body=event.get("requestObject"),
        causes=frozenset(cause.get("reason", "") for cause in answer.get("details", {}).get("causes", ())),
    )
