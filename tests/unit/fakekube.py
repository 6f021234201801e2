"""An API server in memory behind the port's verbs: resource versions, conflicts, and faults on demand."""

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import Resource

Manifest = dict[str, Any]
Place = tuple[str, str, str]


class FakeKube(Kube):
    """As much of an API server as the writers need. `requests` lists verb, plural and name of every request."""

    def __init__(self) -> None:
        self.objects: dict[Place, Manifest] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.before: Callable[[str, str, str], None] = lambda verb, plural, name: None
        """Called before each request; raises what is to go wrong."""
        self.after: Callable[[str, str, str], None] = lambda verb, plural, name: None
        """Called once it was carried out: an answer that gets lost."""
        self._versions = itertools.count(1)

    async def close(self) -> None:
        """Nothing to close."""

    def put(self, resource: Resource, item: Mapping[str, Any]) -> Manifest:
        """Store an object under a new version."""
        stored = copy.deepcopy(dict(item))
        stored["kind"], stored["apiVersion"] = resource.kind, resource.api_version
        metadata = stored.setdefault("metadata", {})
        version = str(next(self._versions))
        metadata["resourceVersion"] = version
        metadata.setdefault("uid", f"uid-{version}")
        self.objects[self._place(resource, metadata.get("namespace"), metadata["name"])] = stored
        return copy.deepcopy(stored)

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        labels: str | None = None,
        fields: str | None = None,
        keep: Callable[[Manifest], Manifest] = lambda item: item,
        seconds: float = 30.0,
    ) -> tuple[list[Manifest], str]:
        """All of a kind; selectors are not looked at."""
        self._begin("list", resource, "")
        found = [keep(copy.deepcopy(item)) for place, item in self.objects.items() if place[0] == resource.plural]
        return found, str(next(self._versions))

    async def get(self, resource: Resource, namespace: str | None, name: str, *, seconds: float = 10.0) -> Manifest:
        """One object or 404."""
        self._begin("get", resource, name)
        return copy.deepcopy(self._known(resource, namespace, name))

    async def create(
        self, resource: Resource, namespace: str | None, body: Mapping[str, Any], *, seconds: float = 10.0
    ) -> Manifest:
        """Store, or 409."""
        name = body["metadata"]["name"]
        self._begin("create", resource, name)
        if self._place(resource, namespace, name) in self.objects:
            raise KubeError(409, "AlreadyExists", f"{resource.plural} {name!r} already exists")
        made = self.put(resource, {**body, "metadata": {**body["metadata"], "namespace": namespace}})
        self.after("create", resource.plural, name)
        return made

    async def replace(
        self, resource: Resource, namespace: str | None, name: str, body: Mapping[str, Any], *, seconds: float = 10.0
    ) -> Manifest:
        """Store on top of the same version, or 409."""
        self._begin("update", resource, name)
        self._same_version(self._known(resource, namespace, name), body)
        made = self.put(resource, body)
        self.after("update", resource.plural, name)
        return made

    async def merge_patch(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Mapping[str, Any],
        *,
        subresource: str | None = None,
    ) -> Manifest:
        """RFC 7386, on top of the version that the patch names."""
        self._begin("patch", resource, name)
        known = self._known(resource, namespace, name)
        self._same_version(known, body)
        changes = {key: value for key, value in body.items() if key != "metadata"}
        made = self.put(resource, merged(known, changes))
        self.after("patch", resource.plural, name)
        return made

    async def apply(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Mapping[str, Any],
        *,
        force: bool,
        seconds: float = 10.0,
    ) -> Manifest:
        """Store; without `force` nothing may be there, and a uid is a precondition."""
        self._begin("apply", resource, name)
        known = self.objects.get(self._place(resource, namespace, name))
        if known is not None and not force:
            raise KubeError(409, "Conflict", "Apply failed with 1 conflict")
        uid = body["metadata"].get("uid")
        if uid is not None and (known is None or known["metadata"]["uid"] != uid):
            raise KubeError(409, "Conflict", "uid mismatch")
        return self.put(resource, merged(known or {}, body))

    async def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str,
        grace_seconds: int | None = None,
        seconds: float = 10.0,
    ) -> Manifest:
        """Remove; 404 and 409 as the API server."""
        self._begin("delete", resource, name)
        known = self._known(resource, namespace, name)
        if known["metadata"]["uid"] != uid:
            raise KubeError(409, "Conflict", "the UID in the precondition differs")
        del self.objects[self._place(resource, namespace, name)]
        return known

    def count(self, verb: str, plural: str) -> int:
        """Requests of a verb on a kind."""
        return sum(1 for request in self.requests if request[:2] == (verb, plural))

    def _begin(self, verb: str, resource: Resource, name: str) -> None:
        self.requests.append((verb, resource.plural, name))
        self.before(verb, resource.plural, name)

    def _known(self, resource: Resource, namespace: str | None, name: str) -> Manifest:
        known = self.objects.get(self._place(resource, namespace, name))
        if known is None:
            raise KubeError(404, "NotFound", f"{resource.plural} {name!r} not found")
        return known

    @staticmethod
    def _place(resource: Resource, namespace: str | None, name: str) -> Place:
        return resource.plural, namespace or "", name

    @staticmethod
    def _same_version(known: Manifest, body: Mapping[str, Any]) -> None:
        wanted = body.get("metadata", {}).get("resourceVersion")
        if wanted is not None and wanted != known["metadata"]["resourceVersion"]:
            raise KubeError(409, "Conflict", "the object has been modified")


def merged(old: Mapping[str, Any], patch: Mapping[str, Any]) -> Manifest:
    """RFC 7386; nulls inside list items are dropped, as the API server does."""
    result = dict(old)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, Mapping) else {}, value)
        else:
            result[key] = value
    return result
