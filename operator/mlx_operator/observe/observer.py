"""The one way into the store: every change of the picture passes here and queues whom it concerns."""

from collections.abc import Callable
from typing import Any

from mlx_operator.act.resources import Resource
from mlx_operator.metrics import Metrics
from mlx_operator.observe.runners import Urgency
from mlx_operator.observe.shelf import Key, Manifest
from mlx_operator.observe.store import Store
from mlx_operator.workqueue import WorkQueue

LAZY_SECONDS = 1.0


class Observer:
    """Feeds the store and the work queue."""

    def __init__(self, store: Store, queue: WorkQueue[Key], metrics: Metrics) -> None:
        self._store = store
        self._queue = queue
        self._metrics = metrics
        self.relisted: Callable[[], None] = lambda: None
        """Called for each object that a watch replays."""

    def event(self, resource: Resource, kind: str | None, item: dict[str, Any]) -> None:
        """A watch event: ADDED, MODIFIED, DELETED, or None for a replayed object."""
        self._metrics.watched(resource.plural)
        if kind == "DELETED":
            metadata = item["metadata"]
            touched = self._store.remove(resource, metadata["uid"], metadata.get("resourceVersion", ""))
        else:
            touched = self._store.put(resource, item)
        if kind is None:
            self.relisted()
        for key in touched:
            self._queue.add(key)

    def answered(self, resource: Resource, item: Manifest) -> None:
        """The answer to a write or a read of ours: later plans see it at once."""
        for key in self._store.put(resource, item):
            self._queue.add(key)

    def changed(self, key: Key, urgency: Urgency = Urgency.AT_ONCE) -> None:
        """Something that is no Kubernetes object changed."""
        if urgency is Urgency.AT_ONCE:
            self._queue.add(key)
        elif urgency is Urgency.LAZY:
            self._queue.add_after(key, LAZY_SECONDS)
