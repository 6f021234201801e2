"""Faults of runners, of the API server and of other people; each heals or says why not."""

import asyncio
import signal

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES, PODS, SERVICES, Resource
from mlx_operator_api.conditions import ConditionType, Reason
from tests.apiserver.harness import Manifest, World, again_in, condition, eventually, is_ready

QUOTAS = Resource("", "v1", "resourcequotas", "ResourceQuota")


async def uids(place: World) -> set[str]:
    return {pod["metadata"]["uid"] for pod in await place.pods()}


async def test_a_killed_engine_is_diagnosed_and_the_group_starts_again_in_the_same_pods(place: World) -> None:
    await place.operator()
    await place.create()
    await place.until_ready()
    before = await uids(place)
    place.kubelet.kill_engine("tiny-1")

    def diagnosed(instance: Manifest) -> bool:
        # Rank 0 may be heard first, of its lost peer; the cause then replaces it.
        message = condition(instance, ConditionType.RUNNER_FAILED).get("message", "")
        return all(word in message for word in ("rank 1/2", "tiny-1", "n2", "SIGKILL"))

    await place.until(diagnosed, "the cause is recorded", seconds=10)
    after = await place.until(again_in(2), "Ready again in epoch 2")
    assert await uids(place) == before
    assert after["status"]["history"][0]["rank"] == 1
    await place.settled()
    warnings = [event for event in await place.events() if event["type"] == "Warning"]
    assert [event["reason"] for event in warnings] == [Reason.RUNNER_FAILED], warnings
    assert "series" not in warnings[0]


async def test_a_supervisor_killed_together_with_its_engine_reports_again_and_the_group_starts_again(
    place: World,
) -> None:
    await place.operator()
    await place.create()
    await place.until_ready()
    before = await uids(place)
    place.kubelet.kill("tiny-0")
    await place.until(again_in(2), "Ready again in epoch 2")
    assert await uids(place) == before


async def test_a_frozen_supervisor_is_unreachable_and_its_group_recovers(place: World) -> None:
    await place.operator()
    await place.create()
    await place.until_ready()
    frozen = place.kubelet.of("tiny-1").process
    assert frozen is not None
    frozen.send_signal(signal.SIGSTOP)

    def recorded(instance: Manifest) -> bool:
        history = instance["status"].get("history", ())
        return bool(history and history[0]["reason"] == Reason.RUNNER_UNREACHABLE and history[0]["rank"] == 1)

    try:
        # 10 s by the default deadline, and as much again for a busy machine.
        told = await place.until(recorded, "rank 1 is unreachable", seconds=20)
    finally:
        frozen.send_signal(signal.SIGCONT)
    failure = told["status"]["history"][0]
    assert "no word on its report stream for 4.5 s" in failure["message"]
    assert failure["consequences"] == [0]
    await place.until(lambda i: is_ready(i) and i["status"]["epoch"] > 1, "Ready again")


async def test_a_deleted_pod_is_replaced(place: World) -> None:
    await place.operator()
    await place.create()
    await place.until_ready()
    (victim,) = (pod for pod in await place.pods() if pod["metadata"]["name"] == "tiny-1")
    await place.kube.delete(PODS, place.namespace, "tiny-1", uid=victim["metadata"]["uid"])
    after = await place.until(again_in(2), "Ready again in epoch 2")
    assert after["status"]["history"][0]["reason"] == Reason.POD_DELETED


async def test_the_operator_outlives_the_api_server(place: World) -> None:
    # Without a Lease, which a slow machine may take longer to give back than its deadline is.
    operator = await place.operator("--no-leader-elect")
    await place.create()
    await place.until_ready()
    await asyncio.to_thread(place.server.stop_apiserver)
    place.kubelet.kill_engine("tiny-1")

    async def noticed() -> bool:
        return "reconcile failed, will be repeated" in operator.lines()

    await eventually(noticed, "the failure cannot be written")
    await asyncio.to_thread(place.server.start_apiserver)
    await place.until(again_in(2), "Ready again in epoch 2")
    assert operator.process.returncode is None


async def test_an_operator_that_lost_its_lease_to_a_long_outage_ends_and_its_successor_goes_on(place: World) -> None:
    operator = await place.operator()
    await place.create()
    await place.until_ready()
    await asyncio.to_thread(place.server.stop_apiserver)
    place.kubelet.kill_engine("tiny-1")
    assert await asyncio.wait_for(operator.process.wait(), 30) == 1
    await asyncio.to_thread(place.server.start_apiserver)
    await place.operator()
    await place.until(again_in(2), "Ready again in epoch 2")


async def test_other_writers_cost_no_status_and_no_event(place: World) -> None:
    await place.operator()
    await place.create()
    finished = asyncio.Event()

    async def disturb() -> None:
        number = 0
        while not finished.is_set():
            number += 1
            body = {"metadata": {"annotations": {"example.com/disturbance": str(number)}}}
            await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", body)

    disturbing = asyncio.create_task(disturb())
    instance = await place.until_ready()
    finished.set()
    await disturbing
    await place.settled()
    conflicts = [r for r in place.writes() if r.resource == "modelinstances/status" and r.code == 409]
    assert instance["status"]["epoch"] == 1
    reasons = [event["reason"] for event in await place.events()]
    for reason in (Reason.PODS_CREATED, Reason.EPOCH_STARTED, Reason.MODEL_LOADED, Reason.READY):
        assert reasons.count(reason) == 1, (reasons, len(conflicts))
    assert len(await place.pods()) == 2


async def test_a_foreign_pod_under_our_name_is_named_and_left_alone(place: World) -> None:
    await place.operator()
    container = {"name": "theirs", "image": "theirs:1"}
    theirs = {"metadata": {"name": "tiny-1"}, "spec": {"containers": [container]}}
    made = await place.kube.create(PODS, place.namespace, {"apiVersion": "v1", "kind": "Pod", **theirs})
    await place.create()

    def conflicted(instance: Manifest) -> bool:
        return condition(instance, ConditionType.READY).get("reason") == Reason.CHILD_CONFLICT

    said = await place.until(conflicted, "the conflict is shown")
    assert "tiny-1" in condition(said, ConditionType.READY)["message"]
    assert (await place.kube.get(PODS, place.namespace, "tiny-1"))["metadata"]["uid"] == made["metadata"]["uid"]
    await place.kube.delete(PODS, place.namespace, "tiny-1", uid=made["metadata"]["uid"], grace_seconds=0)
    await place.until_ready()


async def test_a_foreign_service_under_our_name_is_named_and_left_alone(place: World) -> None:
    await place.operator()
    spec = {"selector": {"app": "theirs"}, "ports": [{"port": 80}]}
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "tiny"}, "spec": spec}
    made = await place.kube.create(SERVICES, place.namespace, theirs)
    await place.create()

    def conflicted(instance: Manifest) -> bool:
        messages = [entry["message"] for entry in instance.get("status", {}).get("conditions", ())]
        return any("Service tiny" in message or "service tiny" in message for message in messages)

    await place.until(conflicted, "the conflict is shown")
    left = await place.kube.get(SERVICES, place.namespace, "tiny")
    assert left["spec"]["selector"] == {"app": "theirs"}
    await place.kube.delete(SERVICES, place.namespace, "tiny", uid=made["metadata"]["uid"])
    await place.until_ready()


async def test_a_quota_is_told_in_the_api_servers_words_and_its_end_is_noticed(place: World) -> None:
    await place.operator()
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "tight"},
        "spec": {"hard": {"pods": "1"}},
    }
    made = await place.kube.create(QUOTAS, place.namespace, quota)
    # Without its controller the quota's status is the test's to write.
    status = {"status": {"hard": {"pods": "1"}, "used": {"pods": "0"}}}
    await place.kube.merge_patch(QUOTAS, place.namespace, "tight", status, subresource="status")
    await place.create()

    def refused(instance: Manifest) -> bool:
        # The API server may not have read the status of the quota at the first attempt, and says that.
        ready = condition(instance, ConditionType.READY)
        return ready.get("reason") == Reason.POD_REFUSED and "exceeded quota: tight" in ready["message"]

    await place.until(refused, "the refusal is shown")
    await place.kube.delete(QUOTAS, place.namespace, "tight", uid=made["metadata"]["uid"])
    await place.until_ready()


async def test_a_service_that_somebody_deleted_is_made_again(place: World) -> None:
    await place.operator()
    await place.create()
    await place.until_ready()
    service = await place.kube.get(SERVICES, place.namespace, "tiny")
    await place.kube.delete(SERVICES, place.namespace, "tiny", uid=service["metadata"]["uid"])

    async def back() -> bool:
        try:
            found = await place.kube.get(SERVICES, place.namespace, "tiny")
        except KubeError:
            return False
        return bool(found["metadata"]["uid"] != service["metadata"]["uid"])

    await eventually(back, "the Service is made again")


async def test_a_suspended_instance_gives_its_pods_back_and_resumes(place: World) -> None:
    await place.operator()
    await place.create()
    await place.until_ready()
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": {"suspend": True}})

    async def no_pods() -> bool:
        return not await place.pods()

    await eventually(no_pods, "the pods are gone")
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": {"suspend": False}})
    instance = await place.until_ready()
    assert instance["status"]["epoch"] == 2
