"""Everything that was observed, and the planner's input made from it.

Plain state without I/O: watches, sweeps, report streams and the answers to our own writes put things in, and each
change names the ModelInstances that have to be planned again.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mlx_operator.act.resources import INSTANCES, NODES, PODS, SERVICES, Resource
from mlx_operator.decide.observed import NodeView, Observed, RunnerView, Settings
from mlx_operator.observe.refusals import Refusals
from mlx_operator.observe.shelf import Key, Manifest, Shelf
from mlx_operator.observe.slim import slim, slim_node, slim_pod
from mlx_operator_api import names

Keys = frozenset[Key]
_NOBODY: Keys = frozenset()


@dataclass(slots=True)
class PodNotes:
    """What is known of one pod besides its object."""

    view: RunnerView = field(default_factory=RunnerView)
    warnings: tuple[str, ...] = ()


class Store:
    """The four kinds, the runners' reports, the API server's refusals."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.refusals = Refusals()
        self._shelves = {
            INSTANCES: Shelf(_named),
            PODS: Shelf(_labelled, slimmer(PODS)),
            SERVICES: Shelf(_labelled),
            NODES: Shelf(_named, slimmer(NODES)),
        }
        self._nodes: dict[str, NodeView] = {}
        self._notes: dict[str, PodNotes] = {}
        self.pod_changed: Callable[[str], None] = lambda _uid: None
        """Called with the uid of each pod that came, changed or went, and when its instance came or went."""

    def put(self, resource: Resource, item: Manifest) -> Keys:
        """Keep an object; returns the instances it concerns, none when it brings nothing new."""
        shelf = self._shelves[resource]
        uid = item["metadata"]["uid"]
        new, before = uid not in shelf, shelf.key(uid)
        kept = shelf.put(item)
        if kept is None:
            return _NOBODY
        if resource is NODES:
            return self._node_changed(kept["metadata"]["name"], node_view(kept))
        if resource is PODS:
            self._notes.setdefault(uid, PodNotes())
            self.pod_changed(uid)
        if resource is INSTANCES and new:
            self._owner_changed(kept)
        key = shelf.key(uid)
        if resource in (PODS, SERVICES) and key is not None:
            # Whatever was answered to its creation, it exists; or to its deletion, that goes on.
            self.refusals.clear(key, kept["metadata"]["name"])
            if kept["metadata"].get("deletionTimestamp"):
                self.refusals.clear(key, uid)
        return _keys(before, key)

    def remove(self, resource: Resource, uid: str, version: str) -> Keys:
        """Forget an object that is gone since `version`; returns the instances it concerned."""
        shelf = self._shelves[resource]
        key, known = shelf.key(uid), shelf.remove(uid, version)
        if known is None:
            return _NOBODY
        if resource is NODES:
            return self._node_changed(known["metadata"]["name"], None)
        if resource is PODS:
            if key is not None:
                self.refusals.clear(key, uid)
            self._notes.pop(uid, None)
            self.pod_changed(uid)
        if resource is INSTANCES:
            self._owner_changed(known)
        return _keys(key)

    def replace(self, resource: Resource, items: list[dict[str, Any]], version: str, namespace: str | None) -> Keys:
        """Take over a full list: put what it has, forget what it proves to be gone."""
        touched = set(_NOBODY)
        for uid in self._shelves[resource].missing_from(items, version, namespace):
            touched |= self.remove(resource, uid, version)
        for item in items:
            touched |= self.put(resource, item)
        return frozenset(touched)

    def count(self, resource: Resource) -> int:
        """Objects known of a kind."""
        return len(self._shelves[resource])

    def pod(self, uid: str) -> Manifest | None:
        """A pod by uid."""
        return self._shelves[PODS].get(uid)

    def pods(self) -> Iterator[Manifest]:
        """All pods."""
        return self._shelves[PODS].values()

    def owner(self, pod_uid: str) -> str | None:
        """The uid of the ModelInstance whose pod this really is, or None.

        Labels are anybody's who may create a pod. What counts is an instance that we know, in the pod's own namespace,
        as its controller; the token of an instance goes to no other pod.
        """
        pod, key = self.pod(pod_uid), self._shelves[PODS].key(pod_uid)
        if pod is None or key is None:
            return None
        known = self._shelves[INSTANCES].uids(key)
        owners = pod["metadata"].get("ownerReferences") or ()
        uid = next((owner.get("uid") for owner in owners if owner.get("controller")), None)
        label = (pod["metadata"].get("labels") or {}).get(names.INSTANCE_UID_LABEL)
        return uid if uid in known and uid == label else None

    def instance(self, key: Key) -> Manifest | None:
        """A ModelInstance; the newest where a deleted namesake was not seen to go yet."""
        found = self._shelves[INSTANCES].of(key)
        return max(found, key=lambda item: int(item["metadata"]["resourceVersion"])) if found else None

    def instances(self) -> Iterator[Manifest]:
        """All ModelInstances."""
        return self._shelves[INSTANCES].values()

    def service(self, key: Key) -> Manifest | None:
        """The labelled Service of an instance."""
        wanted = names.service_name(key.name)
        found = self._shelves[SERVICES].of(key)
        return next((item for item in found if item["metadata"]["name"] == wanted), None)

    def view(self, uid: str) -> RunnerView:
        """What is known of the supervisor in a pod."""
        notes = self._notes.get(uid)
        return notes.view if notes is not None else RunnerView()

    def set_view(self, uid: str, view: RunnerView) -> Keys:
        """Keep what is known of the supervisor in a pod; nothing for a pod that is gone."""
        notes = self._notes.get(uid)
        if notes is None:
            return _NOBODY
        notes.view = view
        return _keys(self._shelves[PODS].key(uid))

    def set_warnings(self, uid: str, warnings: tuple[str, ...]) -> Keys:
        """Keep what Kubernetes says of a pod that waits; no instance when nothing changed."""
        notes = self._notes.get(uid)
        if notes is None or notes.warnings == warnings:
            return _NOBODY
        notes.warnings = warnings
        return _keys(self._shelves[PODS].key(uid))

    def warnings(self, uid: str) -> tuple[str, ...]:
        """What Kubernetes said last of a pod that waits."""
        notes = self._notes.get(uid)
        return notes.warnings if notes is not None else ()

    def observed(self, key: Key) -> Observed | None:
        """The planner's input; None when there is no such ModelInstance."""
        instance = self.instance(key)
        if instance is None:
            return None
        pods = tuple(self._shelves[PODS].of(key))
        uids = [pod["metadata"]["uid"] for pod in pods]
        return Observed(
            instance=instance,
            pods=pods,
            settings=self.settings,
            service=self.service(key),
            runners={uid: self.view(uid) for uid in uids},
            nodes=self._nodes,
            refusals=self.refusals.of(key),
            pod_events={uid: notes for uid in uids if (notes := self.warnings(uid))},
        )

    def _owner_changed(self, instance: Manifest) -> None:
        for uid in self._shelves[PODS].uids(_named(instance)):
            self.pod_changed(uid)

    def _node_changed(self, name: str, view: NodeView | None) -> Keys:
        if self._nodes.get(name) == view:  # a node's heartbeat concerns nobody
            return _NOBODY
        # A new mapping, never the old one changed: a planner may hold that.
        self._nodes = {other: seen for other, seen in self._nodes.items() if other != name}
        if view is not None:
            self._nodes[name] = view
        there = (pod for pod in self.pods() if (pod.get("spec") or {}).get("nodeName") == name)
        return _keys(*(_labelled(pod) for pod in there))


def slimmer(resource: Resource) -> Callable[[Manifest], dict[str, Any]]:
    """What makes an object of a kind as small as it is kept."""
    return {PODS: slim_pod, NODES: slim_node}.get(resource, slim)


def node_view(node: Manifest) -> NodeView:
    """The part of a node that decisions depend on."""
    conditions = (node.get("status") or {}).get("conditions") or ()
    ready: Mapping[str, Any] = next((entry for entry in conditions if entry.get("type") == "Ready"), {})
    since = ready.get("lastTransitionTime")
    return NodeView(
        name=node["metadata"]["name"],
        ready=ready.get("status") == "True",
        since=datetime.fromisoformat(since) if since else None,
        reason=str(ready.get("reason") or ""),
        cordoned=bool((node.get("spec") or {}).get("unschedulable")),
    )


def _named(item: Manifest) -> Key:
    metadata = item["metadata"]
    return Key(metadata.get("namespace", ""), metadata["name"])


def _labelled(item: Manifest) -> Key | None:
    metadata = item["metadata"]
    instance = (metadata.get("labels") or {}).get(names.INSTANCE_LABEL)
    return Key(metadata["namespace"], instance) if instance else None


def _keys(*keys: Key | None) -> Keys:
    return frozenset(key for key in keys if key is not None)
