"""Reads a pod whose report stream broke or that could not be found, unless its watch tells soon what became of it.

A watch may be half-open: it stays open and brings nothing, for a minute or more until the host opens another. What
is then known of the pod is old, and a runner that cannot be reached would be blamed on the network although its pod
is gone. A broken stream is a sign of that, and so is a deletion that found no pod; one request settles it.
"""

import asyncio
import logging
from collections.abc import Callable

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import PODS
from mlx_operator.logs import decision
from mlx_operator.observe.shelf import Key
from mlx_operator.observe.store import Store
from mlx_operator_api import names

PATIENCE_SECONDS = 2.0
"""A watch that works has told by then: the kubelet sends a status within a second."""
SPACING_SECONDS = 0.05
"""Between two requests: a node that goes takes many pods along."""


class PodReads:
    """Each sign leads to one read at most; a failed read is left to the sweep."""

    def __init__(self, kube: Kube, store: Store, *, changed: Callable[[Key], None]) -> None:
        self._kube = kube
        self._store = store
        self._changed = changed
        self._due: dict[str, tuple[float, str]] = {}
        """When, and which version of the pod was known when its stream broke."""
        self._some = asyncio.Event()

    def want(self, uid: str) -> None:
        """The report stream of a pod broke, or it was not there when it was to be deleted."""
        pod = self._store.pod(uid)
        if pod is not None and uid not in self._due:
            due = asyncio.get_running_loop().time() + PATIENCE_SECONDS
            self._due[uid] = due, pod["metadata"]["resourceVersion"]
            self._some.set()

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            if not self._due:
                self._some.clear()
                await self._some.wait()
            uid = next(iter(self._due))  # the oldest: all have the same patience
            due, version = self._due[uid]
            await asyncio.sleep(max(SPACING_SECONDS, due - asyncio.get_running_loop().time()))
            del self._due[uid]
            pod = self._store.pod(uid)
            told = pod is None or pod["metadata"]["resourceVersion"] != version
            if pod is not None and not told and not self._store.view(uid).connected:
                await self._read(uid, pod["metadata"]["namespace"], pod["metadata"]["name"])

    async def _read(self, uid: str, namespace: str, name: str) -> None:
        try:
            # A list says at which version a pod is not there; a 404 does not.
            items, version = await self._kube.list(
                PODS, namespace, labels=names.INSTANCE_LABEL, fields=f"metadata.name={name}"
            )
        except KubeError as error:
            decision("a pod that cannot be reached cannot be read", level=logging.WARNING, error=error, pod_uid=uid)
            return
        touched: set[Key] = set()
        for item in items:
            touched |= self._store.put(PODS, item)
        if all(item["metadata"]["uid"] != uid for item in items):
            touched |= self._store.remove(PODS, uid, version)
        if touched:
            decision("a watch had not told of a pod", level=logging.WARNING, pod=f"{namespace}/{name}", pod_uid=uid)
        for key in touched:
            self._changed(key)
