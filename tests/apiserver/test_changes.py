"""Changes on a real API server, with real supervisors: what each replaces, and that no two epochs serve."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import SERVING
from tests.apiserver.harness import Manifest, World, condition, eventually, is_ready
from tests.apiserver.kubelet import write_model
from tests.changes import CHANGES, Change, Replaces

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def uids(place: World) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in await place.pods()}


@contextlib.asynccontextmanager
async def watched(place: World) -> AsyncIterator[None]:
    """Within it, every report of every supervisor is looked at: no two epochs serve at one time."""
    mixed: list[dict[str, int]] = []

    async def watch() -> None:
        while True:
            reports = {c.name: place.kubelet.report(c.name) for c in place.kubelet.containers.values()}
            epochs = {name: report["epoch"] for name, report in reports.items() if report.get("state") in SERVING}
            if len(set(epochs.values())) > 1:
                mixed.append(epochs)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert mixed == []


@pytest.mark.parametrize("change", [c for c in CHANGES if c.real], ids=lambda change: change.what)
async def test_a_change_replaces_what_it_must_and_no_more(shared: World, change: Change) -> None:
    write_model(shared.kubelet.folder / "models" / "other")
    await shared.create(**change.before)
    await shared.until_ready()
    await shared.settled()
    before, mark = await uids(shared), shared.audit.mark()
    async with watched(shared):
        await shared.kube.merge_patch(INSTANCES, shared.namespace, "tiny", change.patch)
        epoch = 1 if change.replaces is Replaces.NOTHING else 2

        def there(instance: Manifest) -> bool:
            status = instance["status"]
            return is_ready(instance) and (status["epoch"], len(status["runners"])) == (epoch, change.runners)

        after = await shared.until(there, f"Ready in epoch {epoch}")

        async def fits() -> bool:
            return sorted(await uids(shared)) == [f"tiny-{rank}" for rank in range(change.runners)]

        await eventually(fits, "as many pods as runners")
        await shared.settled()
    now = await uids(shared)
    kept = {name for name in now if now[name] == before.get(name)}
    assert kept == (set() if change.replaces is Replaces.PODS else set(before) & set(now))
    assert after["status"].get("restarts", 0) == 0
    assert not after["status"].get("history"), "a change is no failure"
    if change.replaces is Replaces.NOTHING:
        assert shared.writes(mark) == []


async def test_suspended_and_resumed_it_is_a_new_epoch_in_new_pods(shared: World) -> None:
    await shared.create()
    await shared.until_ready()
    before = await uids(shared)
    async with watched(shared):
        await shared.kube.merge_patch(INSTANCES, shared.namespace, "tiny", {"spec": {"suspend": True}})

        def rests(instance: Manifest) -> bool:
            found = {kind: condition(instance, kind) for kind in ConditionType}
            kinds = (ConditionType.READY, ConditionType.RECONCILING, ConditionType.STALLED)
            return all((found[k]["status"], found[k]["reason"]) == ("False", Reason.SUSPENDED) for k in kinds)

        await shared.until(rests, "it is suspended")

        async def empty() -> bool:
            return not await shared.pods()

        await eventually(empty, "no pod is left")
        await shared.kube.merge_patch(INSTANCES, shared.namespace, "tiny", {"spec": {"suspend": False}})
        after = await shared.until_ready()
    assert after["status"]["epoch"] == 2
    assert not set((await uids(shared)).values()) & set(before.values())
