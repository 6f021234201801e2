"""Runs all mutations on one API server with one operator, many at once, and keeps what became of each."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType
from tests.apiserver.harness import World
from tests.mutation.kubelet import TellingKubelet
from tests.mutation.mutations import Mutation
from tests.mutation.state import Manifest, comparable, condition, differences, ready, settled, stalled

WORKERS = 16
SETTLE_SECONDS = 60.0
LOOK_SECONDS = 0.25
STEADY_SECONDS = 1.0
"""A state in which something is in the way has to last so long to count."""


@dataclass
class Outcome:
    """What became of a mutation."""

    refused: str | None = None
    """The API server's words, on creation."""
    refused_change: str | None = None
    """The same for the change of an instance that has a good spec."""
    told: str | None = None
    """The message of Ready of an instance that was made with it, where it is Stalled."""
    told_change: str | None = None
    differs: list[str] = field(default_factory=list)
    """Between an instance that was changed and one that was made with it."""
    trouble: str | None = None
    """A step that did not end in time, such as the way back: the good spec has to make it Ready again."""
    seconds: float = 0.0


class Campaign:
    """One World, with workers that each lead an instance from the good spec through mutations and back."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._api = world.server.api()
        self._seen: dict[str, Manifest] = {}
        self._generations: dict[str, int] = {}
        """Of the last accepted write to each instance: what was seen of an older one says nothing."""
        self._collection = INSTANCES.path(world.namespace)
        self.outcomes: dict[str, Outcome] = {}

    async def run(self, mutations: Iterable[Mutation]) -> dict[str, Outcome]:
        """Every mutation's outcome, by its name."""
        ordered = sorted(mutations, key=lambda each: json.dumps(each.base, sort_keys=True))
        queue = deque(enumerate(ordered))
        looking = asyncio.create_task(self._look())
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(WORKERS):
                    group.create_task(self._work(f"led-{number:02}", queue))
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
        return self.outcomes

    async def _work(self, name: str, queue: deque[tuple[int, Mutation]]) -> None:
        # Names are all of one length: where a long message is cut depends on it.
        turn = 0
        while queue:
            number, mutation = queue.popleft()
            outcome = self.outcomes[mutation.name] = Outcome()
            began = time.monotonic()
            try:
                kept = await self._try(f"{name}-{turn:03}", f"made-{number:05}", mutation, outcome)
            except TimeoutError as error:
                outcome.trouble, kept = str(error), False
            outcome.seconds = time.monotonic() - began
            if not kept:
                await self._world.delete(f"{name}-{turn:03}")
                turn += 1

    async def _try(self, name: str, fresh: str, mutation: Mutation, outcome: Outcome) -> bool:
        """One mutation; returns whether the instance `name` can be used for the next."""
        outcome.refused = await self._post(fresh, mutation.spec, mutation.annotations)
        try:
            await self._is_good(name, mutation)
            outcome.refused_change = await self._put(name, mutation.spec, mutation.annotations)
            if outcome.refused is not None or outcome.refused_change is not None:
                return outcome.refused_change is not None
            await self._compare(name, fresh, outcome)
            await self._put_good(name, mutation)
            healed = await self._until(name, ready, "Ready again with the good spec")
            return "history" not in healed["status"]
        finally:
            if outcome.refused is None:
                await self._world.delete(fresh)

    async def _is_good(self, name: str, mutation: Mutation) -> None:
        """An instance that is Ready with the mutation's base."""
        if name not in self._generations:
            refused = await self._post(name, mutation.base, mutation.base_annotations)
            assert refused is None, refused
        await self._put_good(name, mutation)
        await self._until(name, ready, "Ready with the good spec")

    async def _put_good(self, name: str, mutation: Mutation) -> None:
        refused = await self._put(name, mutation.base, mutation.base_annotations)
        assert refused is None, refused

    async def _compare(self, name: str, fresh: str, outcome: Outcome) -> None:
        """Wait until both are settled and the same, and record what is left of their difference."""
        await self._until(fresh, settled, "settled, made with it")
        await self._until(name, settled, "settled, changed to it")
        deadline, since = time.monotonic() + SETTLE_SECONDS, time.monotonic()
        while True:
            made, changed, now = self._seen[fresh], self._seen[name], time.monotonic()
            outcome.differs = differences(self._state(changed), self._state(made))
            same = not outcome.differs and settled(made) and settled(changed)
            since = since if same else now
            # Something in the way may pass: it counts once it lasts.
            if now > deadline or (same and (not stalled(made) or now - since >= STEADY_SECONDS)):
                break
            await asyncio.sleep(LOOK_SECONDS)
        outcome.told, outcome.told_change = (_why_stalled(each) for each in (made, changed))

    def _state(self, instance: Manifest) -> Any:
        kubelet, uid = self._world.kubelet, instance["metadata"]["uid"]
        assert isinstance(kubelet, TellingKubelet)
        containers = [
            c for c in kubelet.containers.values() if c.manifest["metadata"]["labels"][names.INSTANCE_UID_LABEL] == uid
        ]
        told = {container.name: kubelet.told(container.uid) for container in containers}
        return comparable(instance, [container.manifest for container in containers], told)

    # -- requests whose refusal is wanted whole
    async def _post(self, name: str, spec: dict[str, Any], annotations: dict[str, str]) -> str | None:
        return await self._send("POST", self._collection, self._body(name, spec, annotations))

    async def _put(self, name: str, spec: dict[str, Any], annotations: dict[str, str]) -> str | None:
        """Replace the spec, as `kubectl replace` does."""
        seen = self._seen.get(name)
        while True:
            seen = seen or await self._world.get(name)
            body = self._body(name, spec, annotations)
            body["metadata"]["resourceVersion"] = seen["metadata"]["resourceVersion"]
            refused = await self._send("PUT", f"{self._collection}/{name}", body)
            if refused is None or "the object has been modified" not in refused:
                return refused
            seen = None

    def _body(self, name: str, spec: dict[str, Any], annotations: dict[str, str]) -> dict[str, Any]:
        metadata = {"name": name, "namespace": self._world.namespace, "annotations": annotations}
        return {"apiVersion": INSTANCES.api_version, "kind": INSTANCES.kind, "metadata": metadata, "spec": spec}

    async def _send(self, method: str, path: str, body: dict[str, Any]) -> str | None:
        status, text = await asyncio.to_thread(self._api.request, method, f"{path}?fieldValidation=Strict", body)
        answer = json.loads(text)
        if status not in (200, 201):
            return str(answer["message"])
        self._generations[answer["metadata"]["name"]] = answer["metadata"]["generation"]
        return None

    # -- watching
    async def _look(self) -> None:
        while True:
            try:
                items, _ = await self._world.kube.list(INSTANCES, self._world.namespace)
            except KubeError:
                items = []
            self._seen.update({item["metadata"]["name"]: item for item in items})
            await asyncio.sleep(LOOK_SECONDS)

    async def _until(self, name: str, check: Callable[[Manifest], bool], what: str) -> Manifest:
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            seen = self._seen.get(name)
            if seen is not None and seen["metadata"]["generation"] >= self._generations[name] and check(seen):
                return seen
            if time.monotonic() > deadline:
                brief = ((seen or {}).get("status") or {}).get("brief")
                raise TimeoutError(f"{name} is not {what} within {SETTLE_SECONDS:g} s: {brief}")
            await asyncio.sleep(LOOK_SECONDS / 2)


def _why_stalled(instance: Manifest) -> str | None:
    return str(condition(instance, ConditionType.READY)["message"]) if stalled(instance) else None
