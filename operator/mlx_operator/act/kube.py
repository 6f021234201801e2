"""The port to the Kubernetes API: a few verbs that speak dicts, over the raw request path of `kubernetes.aio`.

The typed calls of the client are avoided: they validate bodies against models that reject valid pods, and the calls
without preloading never raise. Here every answer's status is checked and every failure is a `KubeError`.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import client, config

from mlx_operator.act.resources import LEASES, Resource
from mlx_operator_api import names

Manifest = dict[str, Any]
REQUEST_SECONDS = 10.0
CHILD_SECONDS = 40.0
"""For what admission webhooks look at: each has up to 30 s, and the API server itself gives up after 34 s."""
LIST_SECONDS = 30.0
PAGE = 100
"""Objects of a list that lie in memory as JSON at a time: what a page leaves behind is reused for the next one."""
LONGEST_PAUSE_SECONDS = 10.0
MAX_MESSAGE = 600
_HEAD = 400
_MERGE_PATCH = "application/merge-patch+json"
_APPLY_PATCH = "application/apply-patch+yaml"
_TERMINATING = "because it is being terminated"
_WEBHOOK = "failed calling webhook"
_LATE = re.compile(r"deadline exceeded|Client\.Timeout|(handshake|i/o) timeout")
# An apply of a malformed object is answered 500, not 422: a repetition cannot help.
_MALFORMED_APPLY = "failed to create typed patch object"


class KubeError(Exception):
    """A request that did not succeed.

    `status` is the HTTP status (0: no answer came), `reason` the API's word such as `AlreadyExists`, `message` its
    text of at most 600 characters.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status = status
        self.reason = reason
        self.message = _shortened(message)
        super().__init__(f"{status} {reason}: {self.message}")

    @property
    def ambiguous(self) -> bool:
        """The request may have been carried out although no success was answered."""
        return self.status == 0 or self.status >= 500

    @property
    def exists(self) -> bool:
        """There is an object under the name that was to be created."""
        return self.status == 409 and self.reason == "AlreadyExists"

    @property
    def contended(self) -> bool:
        """Somebody else wrote at the same moment: the object, or a quota that counts it."""
        return self.status == 409 and self.reason == "Conflict"

    @property
    def terminating(self) -> bool:
        """The namespace is on its way out and takes nothing new."""
        return self.status == 403 and _TERMINATING in self.message

    @property
    def transient(self) -> bool:
        """The same request may succeed later, whatever anybody does (the one place that says so)."""
        return self.ambiguous or self.status in (401, 408, 429)

    @property
    def unreached_webhook(self) -> bool:
        """An admission webhook did not answer: nothing was carried out, and somebody has to bring it back."""
        return self.status == 500 and _WEBHOOK in self.message

    @property
    def unfinished(self) -> bool:
        """The API server's own time for the request was over: webhooks took too long together, or it is overloaded."""
        return self.status == 504

    @property
    def late(self) -> bool:
        """Somebody was waited for until a time-out: every other attempt would cost as long."""
        return self.unfinished or (self.unreached_webhook and _LATE.search(self.message) is not None)


def _shortened(message: str) -> str:
    """At most 600 characters. What went wrong stands at the end where the API server echoes a whole object."""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[:_HEAD]} … {message[_HEAD + 3 - MAX_MESSAGE :]}"


class RequestObserver(Protocol):
    """Told of every request that was answered or failed (metrics)."""

    def __call__(self, verb: str, resource: str, status: int) -> None:
        """`verb` as in RBAC, `resource` as plural[/subresource], `status` as in `KubeError`."""


async def configuration(kubeconfig: str | None) -> client.Configuration:
    """Where the API server is and who we are: a kubeconfig file, or the pod's service account where it is None.

    Raises:
        kubernetes.aio.config.ConfigException: neither is usable.
    """
    settings = client.Configuration()
    settings.retries = None  # the work queue retries
    if kubeconfig is None:
        config.load_incluster_config(client_configuration=settings)
    else:
        await config.load_kube_config(kubeconfig, client_configuration=settings)
    return settings


class Kube:
    """The verbs. Manifests in, manifests out; `KubeError` for everything that goes wrong.

    Where the API server answers one with `Retry-After`, all wait for that long, whoever sent it.
    """

    def __init__(self, settings: client.Configuration, observer: RequestObserver | None = None) -> None:
        self._api = client.ApiClient(settings)
        self._observer = observer
        self._pause_until = 0.0

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    async def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        labels: str | None = None,
        fields: str | None = None,
        keep: Callable[[Manifest], Manifest] = lambda item: item,
        seconds: float = LIST_SECONDS,
    ) -> tuple[list[Manifest], str]:
        """All objects, page by page, and the resourceVersion at which the whole list was true.

        Items carry no `kind` (the API leaves it out). What is not wanted of each is dropped by `keep` before the next
        page comes. `seconds` bounds each page. An expired page is `KubeError` 410.
        """
        items: list[Manifest] = []
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(PAGE), "continue": None}
        while True:
            page = await self._request("list", resource, namespace, query=query, seconds=seconds)
            if not str(page.get("kind", "")).endswith("List"):
                raise KubeError(0, "NotAList", f"{resource.plural}: the answer has kind {page.get('kind')!r}")
            items += map(keep, page.get("items") or ())
            meta = page.get("metadata") or {}
            query["continue"] = meta.get("continue") or None
            if query["continue"] is None:
                return items, str(meta.get("resourceVersion", ""))

    async def get(
        self, resource: Resource, namespace: str | None, name: str, *, seconds: float = REQUEST_SECONDS
    ) -> Manifest:
        """One object."""
        return await self._request("get", resource, namespace, name, seconds=seconds)

    async def create(
        self, resource: Resource, namespace: str | None, body: Mapping[str, Any], *, seconds: float = REQUEST_SECONDS
    ) -> Manifest:
        """POST; 409 `AlreadyExists` where the name is taken, 400 where a field is unknown: it would be dropped."""
        query = {**_WRITER, **_STRICT}
        return await self._request("create", resource, namespace, body=body, query=query, seconds=seconds)

    async def replace(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Mapping[str, Any],
        *,
        seconds: float = REQUEST_SECONDS,
    ) -> Manifest:
        """PUT; 409 `Conflict` where `metadata.resourceVersion` of the body is not the present one."""
        return await self._request("update", resource, namespace, name, body=body, query=_WRITER, seconds=seconds)

    async def merge_patch(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Mapping[str, Any],
        *,
        subresource: str | None = None,
    ) -> Manifest:
        """Merge patch: null removes, lists are replaced whole, `metadata.resourceVersion` makes it optimistic."""
        query = {**_WRITER, **_STRICT}
        return await self._request(
            "patch", resource, namespace, name, subresource, body=body, query=query, content=_MERGE_PATCH
        )

    async def apply(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        body: Mapping[str, Any],
        *,
        force: bool,
        seconds: float = REQUEST_SECONDS,
    ) -> Manifest:
        """Server-side apply; without `force` a field that somebody else manages is a 409.

        With `metadata.uid` in the body it takes that very object, or is a 409.
        """
        query = {**_WRITER, "force": "true" if force else "false"}
        try:
            return await self._request(
                "patch", resource, namespace, name, body=body, query=query, content=_APPLY_PATCH, seconds=seconds
            )
        except KubeError as error:
            if error.status == 500 and _MALFORMED_APPLY in error.message:
                raise KubeError(422, "Invalid", error.message) from error
            if error.status == 422 and "metadata.uid: Invalid value" in error.message:
                raise KubeError(409, "Conflict", error.message) from error
            raise

    async def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        uid: str,
        grace_seconds: int | None = None,
        seconds: float = REQUEST_SECONDS,
    ) -> Manifest:
        """DELETE of this very object (another uid under the name is a 409); the object as it is now, or a Status."""
        body: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        return await self._request("delete", resource, namespace, name, body=body, seconds=seconds)

    async def _request(
        self,
        verb: str,
        resource: Resource,
        namespace: str | None,
        name: str | None = None,
        subresource: str | None = None,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str | None] | None = None,
        content: str = "application/json",
        seconds: float = REQUEST_SECONDS,
    ) -> Manifest:
        status = 0
        if resource != LEASES:  # leadership has a deadline, and the API server a lane of its own for it
            await self._pause()
        try:
            arguments = await self._api.param_serialize(
                _METHODS[verb],
                resource.path(namespace, name, subresource),
                query_params=[(key, value) for key, value in (query or {}).items() if value is not None],
                header_params={"Accept": "application/json", "Content-Type": content},
                body=body,
                auth_settings=["BearerToken"],
            )
            response = await self._api.call_api(*arguments, _request_timeout=seconds)
            status = response.status
            self._told_to_wait(response.headers.get("Retry-After"))
            data = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            status = 0
            raise KubeError(0, type(error).__name__, str(error) or f"no answer within {seconds:g} s") from error
        finally:
            if self._observer is not None:
                kind = resource.plural if subresource is None else f"{resource.plural}/{subresource}"
                self._observer(verb, kind, status)
        return _answer(status, data)

    def _told_to_wait(self, retry_after: str | None) -> None:
        """An API server that has too much to do says (429, 503) for how long nothing more should come."""
        if retry_after is None or not retry_after.isdecimal():
            return
        pause = min(float(retry_after), LONGEST_PAUSE_SECONDS)
        self._pause_until = max(self._pause_until, asyncio.get_running_loop().time() + pause)

    async def _pause(self) -> None:
        left = self._pause_until - asyncio.get_running_loop().time()
        if left > 0:
            await asyncio.sleep(left)


_METHODS = {"list": "GET", "get": "GET", "create": "POST", "update": "PUT", "patch": "PATCH", "delete": "DELETE"}
_WRITER: Mapping[str, str | None] = {"fieldManager": names.FIELD_MANAGER}
_STRICT = {"fieldValidation": "Strict"}


def _answer(status: int, data: bytes) -> Manifest:
    try:
        parsed = json.loads(data)
    except ValueError:
        parsed = None
    if 200 <= status < 300:
        if isinstance(parsed, dict):
            return parsed
        raise KubeError(0, "NotJSON", f"the answer is no JSON object: {data[:80]!r}")
    if isinstance(parsed, dict):
        raise KubeError(status, str(parsed.get("reason") or "Error"), str(parsed.get("message") or ""))
    raise KubeError(status, "Error", data[:MAX_MESSAGE].decode(errors="replace"))
