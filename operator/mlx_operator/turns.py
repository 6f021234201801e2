"""Whose turn it is to be restarted for a new key of the operator: one instance at a time."""

from collections.abc import Mapping
from typing import Any

from mlx_operator.logs import decision
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator_api.conditions import ConditionType, Reason


class Turns:
    """The one that is under way, and those that wait for it to be Ready, Stalled, suspended or gone.

    A restarted operator finds the one under way by its status. It cannot tell it from another group that starts again,
    so such a group is waited for as well; one in its first epoch is not.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[Key, None] = {}
        self._holder: Key | None = None
        self._template: str | None = None
        """The holder's template hash when it got its turn; None: it was found under way."""

    def take(self, key: Key) -> bool:
        """Whether it is this instance's turn, from now on until it is done; if not, it is kept in mind for `next`."""
        if self._holder == key and self._template is not None:
            return True
        if not self._free(key):
            self._waiting[key] = None
            return False
        self._waiting.pop(key, None)
        self._holder, self._template = key, _status(self._store.instance(key)).get("templateHash")
        decision("instance follows the new key of the operator", instance=key, waiting=len(self._waiting))
        return True

    def next(self) -> Key | None:
        """One that waits, where nothing holds it up any more."""
        if not self._waiting or (self._holder is not None and self._under_way(self._holder)):
            return None
        key = next(iter(self._waiting))
        del self._waiting[key]
        return key

    def _free(self, key: Key) -> bool:
        if self._holder is None or not self._under_way(self._holder):
            self._template = None
            others = (_key(i) for i in self._store.instances() if _on_its_way(i))
            self._holder = next((other for other in others if other != key), None)
        return self._holder is None

    def _under_way(self, key: Key) -> bool:
        instance = self._store.instance(key)
        if instance is None or instance["metadata"].get("deletionTimestamp"):
            return False
        # Its turn has come, and its status does not show it yet.
        unchanged = self._template is not None and _status(instance).get("templateHash") == self._template
        return _on_its_way(instance) or (unchanged and _is(instance, ConditionType.READY))


def _on_its_way(instance: Mapping[str, Any]) -> bool:
    """It starts again, and is neither Ready nor Stalled nor suspended nor being deleted."""
    if instance["metadata"].get("deletionTimestamp") or _status(instance).get("epoch", 0) < 2:
        return False
    suspended = _condition(instance, ConditionType.READY).get("reason") == Reason.SUSPENDED
    return not (suspended or _is(instance, ConditionType.READY) or _is(instance, ConditionType.STALLED))


def _is(instance: Mapping[str, Any], kind: ConditionType) -> bool:
    return _condition(instance, kind).get("status") == "True"


def _condition(instance: Mapping[str, Any], kind: ConditionType) -> Mapping[str, Any]:
    return next((c for c in _status(instance).get("conditions") or () if c.get("type") == kind), {})


def _status(instance: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return (instance or {}).get("status") or {}


def _key(instance: Mapping[str, Any]) -> Key:
    return Key(instance["metadata"]["namespace"], instance["metadata"]["name"])
