"""The way to Ready: who is told what, and when."""

from dataclasses import replace

import pytest

from mlx_operator.decide.actions import ApplyService, CreatePod, SendTask
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import ConnectToGroup, CreateRunner
from tests.unit.simulated_supervisor import UID, Supervisor
from tests.unit.simulator import Cluster


def told(cluster: Cluster) -> list[tuple[int, str]]:
    """Rank and task of everything sent, each once, in order."""
    return list(dict.fromkeys((s.request.rank, s.request.task.name.value) for s in cluster.sent))


def until(cluster: Cluster, rank: int, state: RunnerState) -> None:
    cluster.run(until=lambda: f"tiny-{rank}" in cluster.pods and reached(cluster, rank, state))
    assert reached(cluster, rank, state)


def reached(cluster: Cluster, rank: int, state: RunnerState) -> bool:
    found = cluster.pods[f"tiny-{rank}"].supervisor
    return found is not None and found.report.state is state


def test_the_first_plan_writes_epoch_and_hashes_and_makes_service_and_pods() -> None:
    cluster = Cluster()
    made = cluster.reconcile(act=False)
    assert made.status.epoch == 1
    assert made.status.runner_image == "runner:1"
    assert made.status.spec_hash and made.status.template_hash
    assert made.status.endpoint == "http://tiny.default.svc:8080/v1"
    assert made.status.runners_ready == "0/2"
    service, *pods = made.actions
    assert isinstance(service, ApplyService)
    assert [pod.name for pod in pods if isinstance(pod, CreatePod)] == ["tiny-0", "tiny-1"]
    assert {pod.secret for pod in pods if isinstance(pod, CreatePod)} == {"tiny-6f1f4e2a-abcdef01"}


def test_a_group_is_told_its_tasks_in_the_order_of_the_lifecycle() -> None:
    cluster = Cluster()
    cluster.run()
    assert cluster.ready()
    tasks = [name for _, name in told(cluster)]
    assert tasks == [
        "CreateRunner", "CreateRunner", "DownloadModel", "DownloadModel", "ConnectToGroup", "ConnectToGroup",
        "LoadModel", "LoadModel", "StartWarmup", "StartWarmup",
    ]  # fmt: skip


def supervisor(cluster: Cluster, rank: int) -> Supervisor:
    found = cluster.pods[f"tiny-{rank}"].supervisor
    assert found is not None
    return found


def test_every_rank_is_told_the_memory_limits_of_all_as_they_were_when_the_epoch_began() -> None:
    cluster = Cluster()
    limits = (1 << 30, 2 << 30)
    cluster.memory_limits = dict(enumerate(limits))
    cluster.run(until=lambda: any(isinstance(s.request.task, CreateRunner) for s in cluster.sent))
    # A report that changes later, as when a pod is resized in place, changes nothing in this epoch.
    supervisor(cluster, 1).publish(memory_limit_bytes=5)
    cluster.run()
    assert cluster.ready()
    assert tuple(r.memory_limit_bytes for r in cluster.status.runners) == limits
    created = [s.request.task for s in cluster.sent if isinstance(s.request.task, CreateRunner)]
    assert {s.memory_limits for s in created} == {limits}


def test_the_loaded_condition_says_once_what_the_ranks_say_of_their_shards() -> None:
    cluster = Cluster()
    for rank in (0, 1):
        until(cluster, rank, RunnerState.PENDING)
    cast = "cast from bfloat16 to float32 on CPU"
    supervisor(cluster, 1).note = cast
    supervisor(cluster, 0).note = f"{cast}; memory for 4096 tokens in work at once, 4096 in one request"
    cluster.run()
    loaded = cluster.status.condition(ConditionType.LOADED)
    assert loaded is not None
    assert loaded.message.endswith(f"; {cast}; memory for 4096 tokens in work at once, 4096 in one request")
    assert loaded.message.count(cast) == 1
    assert cluster.status.runner(1).note == cast


def test_one_runner_is_never_told_to_connect_and_is_connected_at_once() -> None:
    cluster = Cluster(runners=1)
    cluster.run()
    assert cluster.ready()
    assert [name for _, name in told(cluster)] == ["CreateRunner", "DownloadModel", "LoadModel", "StartWarmup"]
    connected = cluster.patches[0].condition(ConditionType.CONNECTED)
    assert connected is not None
    assert (connected.status, connected.reason) == ("True", Reason.SINGLE_RUNNER)


def test_a_pipeline_connects_all_at_once_with_the_addresses_of_all() -> None:
    cluster = Cluster(runners=3)
    cluster.run()
    sent = [s.request.task for s in cluster.sent if isinstance(s.request.task, ConnectToGroup)]
    assert len(sent) >= 3
    assert {len(task.peers) for task in sent} == {3}
    ips = [cluster.pods[f"tiny-{rank}"].manifest["status"]["podIP"] for rank in range(3)]
    assert [peer.pod_ip for peer in sent[0].peers] == ips
    assert {peer.port for peer in sent[0].peers} == {names.FRAME_PORT}


def test_the_last_rank_of_a_tensor_group_connects_when_all_others_listen() -> None:
    cluster = Cluster(runners=3, sharding="Tensor")
    until(cluster, 1, RunnerState.CONNECTING)
    assert not cluster.supervisor(0).report.ring_listening
    assert (2, "ConnectToGroup") not in told(cluster)
    cluster.supervisor(0).publish(ring_listening=True)
    cluster.hear_all()
    cluster.reconcile()
    assert (2, "ConnectToGroup") not in told(cluster)
    cluster.supervisor(1).publish(ring_listening=True)
    cluster.hear_all()
    cluster.reconcile()
    assert (2, "ConnectToGroup") in told(cluster)


def test_nobody_connects_before_every_rank_has_its_files() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: len(told(cluster)) == 4)
    cluster.supervisor(1).running = None
    for _ in range(5):
        cluster.tick()
        cluster.hear_all()
        cluster.reconcile()
    assert cluster.supervisor(0).report.model_available
    assert not [t for t in told(cluster) if t[1] == "ConnectToGroup"]


def test_ranks_above_0_warm_up_first_and_rank_0_when_they_wait_for_it() -> None:
    cluster = Cluster(runners=3)
    cluster.run()
    warm = [rank for rank, name in told(cluster) if name == "StartWarmup"]
    assert warm[-1] == 0
    assert sorted(warm[:2]) == [1, 2]


def test_ready_waits_for_the_endpoint_of_rank_0() -> None:
    cluster = Cluster()
    cluster.run()
    status = cluster.pods["tiny-0"].manifest["status"]
    status["conditions"] = [c for c in status["conditions"] if c["type"] != "Ready"]
    cluster.reconcile()
    ready = cluster.status.condition(ConditionType.READY)
    assert ready is not None
    assert (ready.status, ready.reason) == ("False", Reason.WAITING_FOR_ENDPOINT)


def test_the_epoch_is_given_to_all_pods_in_one_write_before_the_first_create_runner() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: any(record.epoch for record in cluster.status.runners))
    status = cluster.status
    assert [record.epoch for record in status.runners] == [1, 1]
    assert all(record.pod_uid and record.incarnation for record in status.runners)
    first = next(s for s in cluster.sent if isinstance(s.request.task, CreateRunner))
    assert first.request.epoch == 1
    stored = [patch.runner(0).epoch for patch in cluster.patches]
    assert stored.index(1) > 0
    assert first.request.instance_uid == UID


def test_a_task_without_an_acknowledgement_is_sent_again_after_two_seconds() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: bool(cluster.sent))
    cluster.sent.clear()
    for name in cluster.pods:
        supervisor = cluster.pods[name].supervisor
        assert supervisor is not None
        supervisor.report = supervisor.report.model_copy(update={"epoch": 0, "tasks": ()})
    cluster.hear_all()
    made = cluster.reconcile(act=False)
    sends = [a for a in made.actions if isinstance(a, SendTask)]
    assert {s.request.task.name for s in sends} == {TaskName.CREATE_RUNNER}
    assert made.requeue_at is not None
    assert (made.requeue_at - cluster.now).total_seconds() <= 2.0


def test_an_acknowledged_task_is_not_sent_again() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: any(s.request.task.name is TaskName.DOWNLOAD_MODEL for s in cluster.sent))
    made = cluster.reconcile(act=False)
    assert not [a for a in made.actions if isinstance(a, SendTask)]


def test_tasks_carry_the_leaders_transitions() -> None:
    cluster = Cluster()
    cluster.settings = replace(cluster.settings, lease_transitions=7)
    cluster.run()
    assert {s.request.lease_transitions for s in cluster.sent} == {7}


def test_a_busy_instance_writes_nothing_when_ready_and_running_alternate() -> None:
    cluster = Cluster()
    cluster.run()
    patches = len(cluster.patches)
    for state in [RunnerState.RUNNING, RunnerState.READY] * 5:
        cluster.supervisor(0).publish(state=state, active_requests=1, since=cluster.now)
        cluster.hear_all()
        cluster.reconcile()
    assert len(cluster.patches) == patches


@pytest.mark.parametrize("seconds", [1, 3600, 100_000])
def test_an_idle_instance_writes_nothing_however_long(seconds: int) -> None:
    cluster = Cluster()
    cluster.run()
    patches = len(cluster.patches)
    cluster.wait(seconds)
    cluster.hear_all()
    made = cluster.reconcile()
    assert len(cluster.patches) == patches
    assert (made.actions, made.events) == ((), ())


def test_progress_of_a_quick_load_costs_no_write() -> None:
    cluster = Cluster()
    until(cluster, 0, RunnerState.LOADING)
    cluster.supervisor(0).running = None
    cluster.hear_all()
    cluster.reconcile()
    patches = len(cluster.patches)
    for loaded in range(1, 12):
        cluster.supervisor(0).publish(layers_loaded=loaded, layers_total=12, layers="0-11")
        cluster.hear_all()
        cluster.reconcile()
    assert len(cluster.patches) == patches


def test_progress_of_a_long_load_is_told_in_steps_of_ten_percent() -> None:
    cluster = Cluster(deadlines={"load": "2h"})
    until(cluster, 0, RunnerState.LOADING)
    cluster.supervisor(0).running = None
    cluster.supervisor(1).running = None
    seen: list[Status] = []
    for loaded in range(101):
        cluster.supervisor(0).publish(layers_loaded=loaded, layers_total=100)
        cluster.wait(20)
        cluster.hear_all()
        cluster.reconcile()
        seen.append(cluster.status)
    shown = list(dict.fromkeys(s.runner(0).progress for s in seen))
    assert "50/100 layers" in shown
    assert len(shown) <= 13
    assert cluster.condition(ConditionType.RUNNER_FAILED) == "False"
