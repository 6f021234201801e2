"""A kubelet and a scheduler without a node: pods get a loopback address and a real supervisor process.

The supervisors are the runner image's own, with `tests/runner/fake_engine.py` as their engine, so that the protocol,
the reports and the ways to die are the real ones. Each pod has an address of 127.0.0.0/8 and a cgroup to itself; that
is a folder, in which a test plays the kernel.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp

from mlx_operator.act.kube import Kube, KubeError
from mlx_operator.act.resources import NODES, PODS
from mlx_operator_api import names
from tests.apiserver.containers import Containers
from tests.apiserver.pod_process import Container, now, persist, python_path, write_model

__all__ = ["NODE_NAMES", "Container", "Kubelet", "python_path", "write_model"]

NODE_NAMES = ("n1", "n2")


class Kubelet(Containers):
    """Runs the pods of all ModelInstances of one namespace; an async context manager.

    Args:
        kube: as the kubelet.
        session: authenticated, for the watch.
        server: URL of the API server.
        namespace: whose pods are run.
        folder: for state, tokens, logs and the model.
    """

    def __init__(self, kube: Kube, session: aiohttp.ClientSession, server: str, namespace: str, folder: Path) -> None:
        super().__init__(kube, folder)
        self._namespace = namespace
        self._session = session
        self._server = server
        self.unplaceable = ""
        """The scheduler's words about all pods that have no node yet; empty: they get one."""
        self._subnet = "127." + ".".join(str(random.randint(2, 250)) for _ in range(2))  # noqa: S311 (no secret)
        self._next = 1
        self._watch: asyncio.Task[None] | None = None
        self._ending: dict[str, Container] = {}
        """By uid: their processes were told to end, and the pods stay until they have."""

    async def __aenter__(self) -> "Kubelet":
        for name in NODE_NAMES:
            await self.set_node(name, ready=True)
        self._watch = asyncio.create_task(self._follow(), name="kubelet")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._watch is not None
        self._watch.cancel()
        containers = [*self.containers.values(), *self._ending.values()]
        for container in containers:
            await self._end(container, kill=True)
        tasks = [task for container in containers for task in container.tasks]
        await asyncio.gather(self._watch, *tasks, return_exceptions=True)

    async def set_node(self, name: str, *, ready: bool) -> None:
        """Create a node, or change its Ready condition."""
        with suppress(KubeError):
            await self._kube.create(NODES, None, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
        condition = {"type": "Ready", "status": "True" if ready else "Unknown", "lastTransitionTime": now()}
        condition |= {"reason": "KubeletReady" if ready else "NodeStatusUnknown", "message": ""}
        body = {"status": {"conditions": [condition]}}
        await self._kube.merge_patch(NODES, None, name, body, subresource="status")

    def places(self, pod: dict[str, Any]) -> bool:
        """Whether there is a node for a pod."""
        return "nodeSelector" not in pod["spec"]

    # -- the watch
    async def _follow(self) -> None:
        while True:
            try:
                items, version = await self._kube.list(PODS, self._namespace, labels=names.INSTANCE_LABEL)
                present = {item["metadata"]["uid"] for item in items}
                for item in items:
                    await self._seen(item)
                for uid in [uid for uid in self.containers if uid not in present]:
                    await self._end(self.containers[uid], kill=True)
                async for kind, item in self._events(version):
                    if kind == "DELETED":
                        gone = self.containers.get(item["metadata"]["uid"])
                        if gone is not None:
                            await self._end(gone, kill=True)
                    elif kind in ("ADDED", "MODIFIED"):
                        await self._seen(item)
            except (KubeError, aiohttp.ClientError, OSError, TimeoutError, ValueError):  # also an event that breaks off
                await asyncio.sleep(0.2)

    async def _events(self, version: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        query = {"watch": "1", "labelSelector": names.INSTANCE_LABEL, "resourceVersion": version}
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(
            self._server + PODS.path(self._namespace), params=query, timeout=timeout
        ) as answer:
            async for line in answer.content:
                event = json.loads(line)
                yield event["type"], event["object"]

    async def _seen(self, pod: dict[str, Any]) -> None:
        uid = pod["metadata"]["uid"]
        container = self.containers.get(uid)
        if uid in self._ending:
            return  # also what was told of it meanwhile, such as a status that was on its way
        if pod["metadata"].get("deletionTimestamp"):
            if container is None:
                await self._delete(pod["metadata"]["namespace"], pod["metadata"]["name"], uid)
            else:
                self._ending[uid] = container
                task = asyncio.create_task(self._terminate(container), name="terminate")
                task.add_done_callback(lambda _: self._ending.pop(uid))
                container.tasks.append(task)
        elif container is None and self.unplaceable and not pod["spec"].get("nodeName"):
            await self._not_placed(pod)
        elif container is None and self.places(pod):
            await self._place(pod)

    async def _not_placed(self, pod: dict[str, Any]) -> None:
        """As the scheduler says it: a condition, and nothing while that is the same."""
        words = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": self.unplaceable}
        known: dict[str, Any] = next(
            (c for c in pod["status"].get("conditions", ()) if c["type"] == "PodScheduled"), {}
        )
        if known.get("message") == self.unplaceable:
            return
        body = {"status": {"conditions": [words | {"lastTransitionTime": now()}]}}
        metadata = pod["metadata"]
        await persist(
            lambda: self._kube.merge_patch(PODS, metadata["namespace"], metadata["name"], body, subresource="status")
        )

    async def place_all(self) -> None:
        """Nodes have room again."""
        self.unplaceable = ""
        for pod in (await self._kube.list(PODS, self._namespace, labels=names.INSTANCE_LABEL))[0]:
            await self._seen(pod)

    async def _place(self, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        rank = int(metadata["labels"][names.RANK_LABEL])
        node = pod["spec"].get("nodeName") or NODE_NAMES[rank % len(NODE_NAMES)]
        ip = f"{self._subnet}.{self._next}"
        self._next += 1
        container = Container(metadata["uid"], metadata["namespace"], metadata["name"], ip, node, pod)
        self.containers[container.uid] = container
        container.tasks.append(asyncio.create_task(self._live(container), name="live"))
