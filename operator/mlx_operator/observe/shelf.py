"""Objects of one kind as they were last seen: newer replaces older, whatever order they arrive in."""

import marshal
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Kept:
    """An object, packed: as dicts it would take three times the memory, and most are looked at once in minutes."""

    key: Key | None
    name: str
    namespace: str | None
    version: str | None
    packed: bytes

    def unpacked(self) -> Manifest:
        """The object, made anew: nobody's changes come back here."""
        found: Manifest = marshal.loads(self.packed)  # noqa: S302 (our own bytes, in our own memory)
        return found


class Shelf:
    """Objects by uid, with an index by the key that `key_of` gives them (None: not of interest); `keep` slims each.

    Arrivals come from watches, lists and the answers to our own writes, in any order. Only a newer resourceVersion
    replaces an object, and one that was seen to go comes back only with a version after that (its label came back).
    """

    def __init__(
        self, key_of: Callable[[Manifest], Key | None], keep: Callable[[Manifest], dict[str, Any]] = slim
    ) -> None:
        self._key_of = key_of
        self._keep = keep
        self._objects: dict[str, _Kept] = {}
        self._index: dict[Key, set[str]] = {}
        self._deleted: OrderedDict[str, int | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._objects)

    def __contains__(self, uid: str) -> bool:
        return uid in self._objects

    def get(self, uid: str) -> Manifest | None:
        """The object with this uid."""
        known = self._objects.get(uid)
        return known.unpacked() if known is not None else None

    def key(self, uid: str) -> Key | None:
        """The key of the object with this uid; None also where there is no such object."""
        known = self._objects.get(uid)
        return known.key if known is not None else None

    def values(self) -> Iterator[Manifest]:
        """All objects, one at a time."""
        return (known.unpacked() for known in tuple(self._objects.values()))

    def keys(self) -> list[Key]:
        """All keys that have an object."""
        return list(self._index)

    def uids(self, key: Key) -> list[str]:
        """The uids of the objects of a key, oldest name first so that the order is stable."""
        return sorted(self._index.get(key, ()), key=lambda uid: (self._objects[uid].name, uid))

    def of(self, key: Key) -> list[Manifest]:
        """The objects of a key, in the order of `uids`."""
        return [self._objects[uid].unpacked() for uid in self.uids(key)]

    def put(self, item: Manifest) -> Manifest | None:
        """Keep an object; returns what is now kept, or None when it is not newer than what is known."""
        metadata = item["metadata"]
        uid, version = metadata["uid"], metadata.get("resourceVersion")
        known = self._objects.get(uid)
        if known is None and not self._revives(item):
            return None
        if known is not None and not newer(version, known.version):
            return None
        if known is not None:
            self._unindex(uid, known)
        kept = self._keep(item)
        key = self._key_of(kept)
        packed = marshal.dumps(kept)
        self._objects[uid] = _Kept(key, metadata["name"], metadata.get("namespace"), version, packed)
        if key is not None:
            self._index.setdefault(key, set()).add(uid)
        return kept

    def remove(self, uid: str, version: str) -> Manifest | None:
        """Forget an object that is gone since `version`; returns what was known of it."""
        self._deleted[uid] = _number(version)
        while len(self._deleted) > _TOMBSTONES:
            self._deleted.popitem(last=False)
        known = self._objects.pop(uid, None)
        if known is None:
            return None
        self._unindex(uid, known)
        return known.unpacked()

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
            and (namespace is None or known.namespace == namespace)
            and (at is None or (_number(known.version) or 0) <= at)
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

    def _unindex(self, uid: str, known: _Kept) -> None:
        if known.key is None or known.key not in self._index:
            return
        self._index[known.key].discard(uid)
        if not self._index[known.key]:
            del self._index[known.key]


def newer(version: str | None, known: str | None) -> bool:
    """Whether `version` is later than the known one. Versions that are no numbers: whether it differs."""
    left, right = _number(version), _number(known)
    if left is None or right is None:
        return version != known
    return left > right


def _number(version: object) -> int | None:
    return int(version) if isinstance(version, str) and version.isdecimal() else None
