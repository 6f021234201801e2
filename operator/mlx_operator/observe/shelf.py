"""Objects of one kind as they were last seen: newer replaces older, whatever order they arrive in."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mlx_operator.observe.slim import slim

Manifest = Mapping[str, Any]
_TOMBSTONES = 8192


class Key(NamedTuple):
    """A ModelInstance by name; what the work queue holds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Shelf:
    """Objects by uid, with an index by the key that `key_of` gives them (None: not of interest); `keep` slims each.

    Arrivals come from watches, lists and the answers to our own writes, in any order. Only a newer resourceVersion
    replaces an object, and one that was seen to go comes back only with a version after that (its label came back).
    """

    def __init__(self, key_of: Callable[[Manifest], Key | None], keep: Callable[[Manifest], Manifest] = slim) -> None:
        self._key_of = key_of
        self._keep = keep
        self._objects: dict[str, Manifest] = {}
        self._index: dict[Key, set[str]] = {}
        self._deleted: OrderedDict[str, int | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._objects)

    def get(self, uid: str) -> Manifest | None:
        """The object with this uid."""
        return self._objects.get(uid)

    def values(self) -> list[Manifest]:
        """All objects."""
        return list(self._objects.values())

    def keys(self) -> list[Key]:
        """All keys that have an object."""
        return list(self._index)

    def of(self, key: Key) -> list[Manifest]:
        """The objects of a key, oldest name first so that the order is stable."""
        found = [self._objects[uid] for uid in self._index.get(key, ())]
        return sorted(found, key=lambda item: (item["metadata"]["name"], item["metadata"]["uid"]))

    def put(self, item: Manifest) -> Manifest | None:
        """Keep an object; returns what is now kept, or None when it is not newer than what is known."""
        uid = item["metadata"]["uid"]
        known = self._objects.get(uid)
        if known is None and not self._revives(item):
            return None
        if known is not None and not newer(item, known):
            return None
        if known is not None:
            self._unindex(known)
        kept = self._keep(item)
        self._objects[uid] = kept
        key = self._key_of(kept)
        if key is not None:
            self._index.setdefault(key, set()).add(uid)
        return kept

    def remove(self, uid: str, version: str) -> Manifest | None:
        """Forget an object that is gone since `version`; returns what was known of it."""
        self._deleted[uid] = _number(version)
        while len(self._deleted) > _TOMBSTONES:
            self._deleted.popitem(last=False)
        known = self._objects.pop(uid, None)
        if known is not None:
            self._unindex(known)
        return known

    def missing_from(self, items: Iterable[Manifest], version: str, namespace: str | None) -> list[str]:
        """The uids that a full list at `version` (of one namespace, or of all) proves to be gone.

        An object that is newer than the list says nothing: it may have been created after it.
        """
        present = {item["metadata"]["uid"] for item in items}
        at = _number(version)
        return [
            uid
            for uid, known in self._objects.items()
            if uid not in present
            and (namespace is None or known["metadata"].get("namespace") == namespace)
            and (at is None or (_number(known["metadata"].get("resourceVersion")) or 0) <= at)
        ]

    def _revives(self, item: Manifest) -> bool:
        uid = item["metadata"]["uid"]
        if uid not in self._deleted:
            return True
        gone, version = self._deleted[uid], _number(item["metadata"].get("resourceVersion"))
        if gone is None or version is None or version <= gone:
            return False
        del self._deleted[uid]
        return True

    def _unindex(self, known: Manifest) -> None:
        key = self._key_of(known)
        if key is None or key not in self._index:
            return
        self._index[key].discard(known["metadata"]["uid"])
        if not self._index[key]:
            del self._index[key]


def newer(item: Manifest, known: Manifest) -> bool:
    """Whether `item` is a later version of the same object. Versions that are no numbers: whether it differs."""
    mine, theirs = item["metadata"].get("resourceVersion"), known["metadata"].get("resourceVersion")
    left, right = _number(mine), _number(theirs)
    if left is None or right is None:
        return bool(mine != theirs)
    return left > right


def _number(version: object) -> int | None:
    return int(version) if isinstance(version, str) and version.isdecimal() else None
