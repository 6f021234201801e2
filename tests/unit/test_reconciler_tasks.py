"""Tasks: to whom they go, what their answers do, and that none holds anything up."""

import asyncio
from itertools import pairwise

import pytest

from mlx_operator.act.resources import PODS
from mlx_operator.act.runner import RunnerError
from mlx_operator.decide.actions import Plan
from mlx_operator.decide.observed import RunnerView
from mlx_operator_api.runner import TaskName
from mlx_operator_api.status import Status
from tests.unit.manifests import pod, report
from tests.unit.reconciling import LOAD, TINY, Scene

pytestmark = [pytest.mark.looptime, pytest.mark.timeout(30)]


async def test_a_hanging_task_keeps_no_status_from_being_written(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.gate.clear()
    scene.plans = [Plan(Status(epoch=1), (LOAD,)), Plan(Status(epoch=2), (LOAD,))]
    await scene.reconcile()
    await scene.reconcile()
    await asyncio.sleep(0)
    assert scene.kube.objects["modelinstances", "default", "tiny"]["status"]["epoch"] == 2
    assert len(scene.runner.sent) == 1


async def test_no_task_and_no_token_goes_to_a_pod_that_the_instance_does_not_control(scene: Scene) -> None:
    scene.store.put(PODS, pod(owner="another-uid"))
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    await scene.reconcile()
    await asyncio.sleep(10)
    assert scene.runner.sent == []


async def test_the_answer_to_a_task_is_observed_and_planned_again(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    await scene.reconcile()
    key = await asyncio.wait_for(scene.queue.get(), 1)  # the status that was written
    scene.queue.done(key, ok=True)
    assert await asyncio.wait_for(scene.queue.get(), 1) == TINY
    assert scene.store.view("pod-0").report == report(seq=1)


async def test_an_undelivered_task_is_sent_again_after_a_back_off(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.errors = [RunnerError(0, "refused") for _ in range(4)]
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    loop = asyncio.get_running_loop()
    times: list[float] = []
    scene.queue.add(TINY)
    while len(times) < 5:
        key = await asyncio.wait_for(scene.queue.get(), 10)
        before = len(scene.runner.sent)
        await scene.reconcile()
        await asyncio.sleep(0)
        if len(scene.runner.sent) > before:
            times.append(loop.time())
        scene.queue.done(key, ok=True)
    gaps = [round(after - before, 1) for before, after in pairwise(times)]
    assert gaps == [0.2, 0.4, 0.8, 1.6]
    assert scene.runner.sent[0].task.name is TaskName.LOAD_MODEL


async def test_an_answer_that_is_not_believed_is_not_asked_for_in_a_hot_loop(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.store.set_view("pod-0", RunnerView(report=report(incarnation="another"), connected=True))
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    worker = asyncio.create_task(scene.reconciler.run_worker())
    scene.queue.add(TINY)
    await asyncio.sleep(10)
    assert 2 <= len(scene.runner.sent) < 10
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def test_nothing_is_kept_of_a_pod_that_went_while_a_task_was_under_way(scene: Scene) -> None:
    scene.store.put(PODS, pod())
    scene.runner.gate.clear()
    scene.runner.errors = [RunnerError(0, "refused")]
    scene.plans = [Plan(Status(epoch=1), (LOAD,))]
    await scene.reconcile()
    await asyncio.sleep(0)
    scene.store.remove(PODS, "pod-0", "9")
    scene.runner.gate.set()
    await asyncio.sleep(0.1)
    assert len(scene.runner.sent) == 1
    assert not scene.sender._failures
    assert not scene.sender._not_before
