"""Writes status: only when it differs, only on top of what was planned from."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from mlx_operator.act.kube import Kube, KubeError, Manifest
from mlx_operator.act.resources import INSTANCES
from mlx_operator_api.status import Status


class ConflictError(Exception):
    """The object changed meanwhile: nothing was written. `fresh` is the object as it is now; plan again from it."""

    def __init__(self, fresh: Manifest) -> None:
        self.fresh = fresh
        super().__init__("the ModelInstance changed meanwhile")


class Written(Enum):
    """What became of a status."""

    UNCHANGED = "unchanged"
    WRITTEN = "written"


class StatusWriter:
    """One PATCH per difference, conditional on the resourceVersion."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube

    async def write(self, instance: Mapping[str, Any], status: Status) -> tuple[Written, Mapping[str, Any]]:
        """Make the status stand in the API server; returns the object as it is then.

        Raises:
            ConflictError: somebody else wrote first.
            KubeError: it is not known to stand (404: the object is gone).
        """
        want = wire(status)
        have = instance.get("status") or {}
        if have == want:
            return Written.UNCHANGED, instance
        metadata = instance["metadata"]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": difference(have, want)}
        try:
            answer = await self._kube.merge_patch(
                INSTANCES, metadata["namespace"], metadata["name"], body, subresource="status"
            )
        except KubeError as error:
            if error.status != 409 and not error.ambiguous:
                raise
            # Also after no answer, or a 5xx: only a read tells whether the write was carried out.
            fresh = await self._kube.get(INSTANCES, metadata["namespace"], metadata["name"])
            if fresh["metadata"]["uid"] == metadata["uid"] and (fresh.get("status") or {}) == want:
                return Written.WRITTEN, fresh
            if error.status == 409:
                raise ConflictError(fresh) from error
            raise
        return Written.WRITTEN, answer


def wire(status: Status) -> dict[str, Any]:
    """The status as JSON. Absent values are left out: the API server drops nulls inside lists anyway.

    So are empty lists: `kubectl describe` would print their names with nothing behind them.
    """
    kept: dict[str, Any] = _without_empty(status.model_dump(mode="json", by_alias=True, exclude_none=True))
    return kept


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(inner) for key, inner in value.items() if inner != []}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def difference(have: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch (RFC 7386) that makes `want` of `have`: null removes, lists are replaced whole."""
    patch: dict[str, Any] = dict.fromkeys(key for key in have if key not in want)
    for key, value in want.items():
        old = have.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if nested := difference(old, value):
                patch[key] = nested
        elif key not in have or old != value:
            patch[key] = value
    return patch
