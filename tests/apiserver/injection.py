"""What the components of a cluster do to a pod, and what they say of it, in the way that they do."""

import asyncio
import os
import signal
from datetime import UTC, datetime
from typing import Any

from mlx_operator.act.resources import CORE_EVENTS, PODS, Resource
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.apiserver.crd.kubectl import Kubectl
from tests.apiserver.harness import Manifest, World, condition, eventually

QUOTAS = Resource("", "v1", "resourcequotas", "ResourceQuota")
LIMITS = Resource("", "v1", "limitranges", "LimitRange")
ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount")


async def pod(place: World, name: str) -> Manifest:
    """A pod, once it is there."""

    async def found() -> Manifest | None:
        return next((p for p in await place.pods() if p["metadata"]["name"] == name), None)

    made: Manifest = await eventually(found, f"pod {name} is there")
    return made


async def says(place: World, name: str, reason: str, message: str, kind: str = "Warning") -> None:
    """An Event about a pod, as the kubelet's recorder writes it."""
    about = await pod(place, name)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    event: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{name}.", "namespace": place.namespace},
        "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": name, "namespace": place.namespace},
        "reason": reason,
        "message": message,
        "type": kind,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": "kubelet", "host": "n1"},
    }
    event["involvedObject"]["uid"] = about["metadata"]["uid"]
    await place.kube.create(CORE_EVENTS, place.namespace, event)


def held(place: World, reason: str, message: str, *pods: str) -> None:
    """From now on the kubelet gets no further with these pods than so far."""
    place.kubelet.held |= set(pods)
    place.kubelet.why |= dict.fromkeys(pods, (reason, message))


def released(place: World) -> None:
    """What held pods is over."""
    place.kubelet.held.clear()
    place.kubelet.why.clear()


async def kubectl(place: World, *arguments: str) -> str:
    """The real kubectl, as the administrator."""
    program = Kubectl(place.server.binaries / "kubectl", place.server.kubeconfig)
    return await asyncio.to_thread(program.run, *arguments)


async def delete(place: World, name: str) -> None:
    """Somebody deletes a pod."""
    made = await pod(place, name)
    await place.kube.delete(PODS, place.namespace, name, uid=made["metadata"]["uid"])


def freeze(place: World, name: str) -> int:
    """Stop a supervisor, as a node does that is gone or has no CPU left; returns its pid."""
    process = place.kubelet.of(name).process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    return process.pid


async def fails(place: World, name: str) -> None:
    """Wait until the supervisor of a pod has told of a failure."""

    async def told() -> bool:
        return bool(place.kubelet.report(name).get("state") == RunnerState.FAILED)

    await eventually(told, f"{name} fails", 10)


def stalled(instance: Manifest, reason: Reason) -> bool:
    """Nothing goes on before somebody acts, for this reason."""
    found = condition(instance, ConditionType.STALLED)
    return (found.get("status"), found.get("reason")) == ("True", reason)


def message(instance: Manifest, kind: ConditionType) -> str:
    """The message of a condition; empty before the first status."""
    return str(condition(instance, kind).get("message", ""))
