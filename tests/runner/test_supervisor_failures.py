"""Everything that can happen to an engine, told by real supervisors. The engine is the fake one."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import ORDER, RunnerState, TaskName
from mlx_operator_api.tasks import (
    CreateRunner,
    DeadlineSeconds,
    DownloadModel,
    LoadModel,
    Shutdown,
    StartWarmup,
    TaskPhase,
)

from .faulting import met
from .supervisors import SOURCE, TOKEN, UID, Group, group

S = RunnerState


async def failure_of(instance: Group, rank: int, epoch: int = 1) -> tuple[Reason, str, int | None]:
    report = await instance.pods[rank].state(S.FAILED, epoch)
    assert report.failure is not None
    assert report.failure.epoch == epoch
    return report.failure.reason, report.failure.message, report.peer


async def test_a_group_goes_through_every_state_in_order(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        await instance.ready()
        # One after the other: the engine that is killed first takes its peer along, before that hears of a Shutdown.
        await instance.pods[1].send(Shutdown())
        await instance.pods[1].state(S.SHUTDOWN, 1)
        in_order = [s for s in S if s not in {S.RUNNING, S.FAILED}]
        orders = [list(dict.fromkeys(r.state for r in pod.reports)) for pod in instance.pods]
        assert orders[1] == in_order
        assert orders[0][: len(in_order) - 2] == in_order[:-2]
        for pod in instance.pods:
            assert [r.seq for r in pod.reports] == sorted({r.seq for r in pod.reports})
            assert pod.report.layers == ("2-3" if pod.rank == 0 else "0-1")


async def test_the_incident_load_before_connect_is_rejected_and_the_runner_goes_on(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        await instance.create()
        await instance.download()
        for pod in instance.pods:
            answer = await pod.send(LoadModel())
            rejection = answer.outcome.rejection
            assert answer.outcome.phase is TaskPhase.REJECTED
            assert rejection is not None
            assert (rejection.task, rejection.state, rejection.epoch) == (TaskName.LOAD_MODEL, S.IDLE, 1)
            assert (rejection.world_size, rejection.rank, rejection.group) == (2, pod.rank, "absent")
            assert rejection.accepted_in == (S.CONNECTED,)
            assert (answer.report.state, answer.report.failure) == (S.IDLE, None)
        await instance.connect()
        await instance.all(LoadModel(), S.LOADED, 1)
        for pod in instance.pods:
            lines = [line for line in pod.log.splitlines() if "LoadModel" in line]
            assert f"state=RunnerIdle world_size=2 rank={pod.rank} epoch=1" in lines[0]
            assert "accepted_in=[RunnerConnected]" in lines[0]
            wanted = f"LoadModel accepted: state=RunnerConnected world_size=2 rank={pod.rank} epoch=1 group=present"
            assert wanted in lines[1]


async def test_a_killed_engine_is_told_and_the_next_epoch_runs_in_the_same_supervisors(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        await instance.ready()
        (engine,) = instance.pods[1].engines()
        os.kill(engine, signal.SIGKILL)

        assert await failure_of(instance, 1) == (
            Reason.ENGINE_CRASHED,
            "engine killed by signal 9 (SIGKILL) in RunnerReady",
            None,
        )
        assert instance.pods[1].report.failure is not None
        assert instance.pods[1].report.failure.signal == "SIGKILL"
        reason, _, peer = await failure_of(instance, 0)
        assert (reason, peer) == (Reason.PEER_LOST, 1)

        await instance.ready(2)
        assert not any(r.failure for pod in instance.pods for r in pod.reports if r.epoch == 2)
        for pod in instance.pods:
            assert len(pod.engines()) == 1
            assert engine not in pod.engines()


async def test_a_newer_epoch_replaces_a_healthy_runner_and_never_runs_two_engines(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        await instance.ready()
        for epoch in (2, 3, 4):
            old = pod.engines()
            await instance.create(epoch)
            assert len(pod.engines()) == 1
            assert pod.engines() != old
        await instance.ready(5)
        assert all(r.failure is None for r in pod.reports)


@pytest.mark.parametrize("code", [0, 3])
async def test_an_engine_that_exits_by_itself_is_a_failure_with_its_code(tmp_path: Path, code: int) -> None:
    async with group(tmp_path, 1) as instance:
        await instance.loaded()
        instance.pods[0].plan(exit={"on": "Warmup", "code": code}, stderr="Traceback\n  x\nRuntimeError: no more")
        await instance.pods[0].send(StartWarmup())
        reason, message, _ = await failure_of(instance, 0)
        assert reason is Reason.ENGINE_CRASHED
        told = " without having been told to" if code == 0 else ""
        assert message == f"engine exited with code {code} in RunnerWarmingUp{told}: RuntimeError: no more"
        report = instance.pods[0].report
        assert report.failure is not None
        assert (report.failure.exit_code, report.failure.signal) == (code, None)
        assert report.failure.diagnostics[-1] == "RuntimeError: no more"
        outcome = next(t for t in report.tasks if t.name is TaskName.START_WARMUP)
        assert outcome.phase is TaskPhase.FAILED


async def test_what_the_engine_says_of_its_failure_is_told_as_it_is(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        fail = {"on": "Load", "reason": "ModelUnsupported", "message": "model type x is unknown", "diagnostics": ["x"]}
        instance.pods[0].plan(fail=fail)
        await instance.create()
        await instance.download()
        await instance.pods[0].send(LoadModel())
        assert await failure_of(instance, 0) == (Reason.MODEL_UNSUPPORTED, "model type x is unknown", None)


async def test_a_connect_that_never_ends_names_the_rank_it_waits_for(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        instance.deadlines = DeadlineSeconds(connect=5.0)
        await instance.create()
        await met(lambda: "engine started" in instance.pods[0].log, "the engine is there")
        await instance.pods[0].send(instance.peers())
        report = await instance.pods[0].until(lambda r: r.waiting_for == (1,), "a rank that is waited for")
        assert report.state is S.CONNECTING
        message = "not connected within 5 s: still waiting for rank 1"
        assert await failure_of(instance, 0) == (Reason.CONNECT_TIMEOUT, message, None)


@pytest.mark.parametrize(
    ("hang", "reason", "message"),
    [
        ("Load", Reason.LOAD_TIMEOUT, "not loaded within 1 s: 0/? layers"),
        ("Warmup", Reason.WARMUP_TIMEOUT, "warm-up not done within 1 s, step 4"),
    ],
)
async def test_a_task_that_never_ends_misses_its_deadline(
    tmp_path: Path, hang: str, reason: Reason, message: str
) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        instance.deadlines = DeadlineSeconds(**{hang.lower(): 1.0})
        pod.plan(hang=hang)
        await instance.create()
        await instance.download()
        await met(lambda: "engine started" in pod.log, "the engine is there")
        await pod.send(LoadModel())
        if hang == "Warmup":
            await pod.state(S.LOADED, 1)
            await pod.send(StartWarmup())
        assert await failure_of(instance, 0) == (reason, message, None)
        pod.plan()
        instance.deadlines = DeadlineSeconds()
        await instance.ready(2)


async def test_a_stopped_engine_is_stalled_and_killed(tmp_path: Path) -> None:
    async with group(tmp_path, 2) as instance:
        await instance.ready()
        (engine,) = instance.pods[1].engines()
        os.kill(engine, signal.SIGSTOP)
        reason, message, _ = await failure_of(instance, 1)
        assert reason is Reason.RUNNER_STALLED
        assert message.startswith("engine process stopped (state T for ")
        await instance.ready(2)
        assert engine not in instance.pods[1].engines()


async def test_shutdown_ends_a_stuck_load_and_two_at_once_both_succeed(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        pod.plan(hang="Load")
        await instance.create()
        await instance.download()
        await pod.send(LoadModel())
        first, second = await asyncio.gather(pod.send(Shutdown()), pod.send(Shutdown(), attempt=2))
        assert {first.outcome.phase, second.outcome.phase} <= {TaskPhase.RUNNING, TaskPhase.COMPLETE}
        report = await pod.state(S.SHUTDOWN, 1)
        assert report.failure is None
        outcomes = [t for t in report.tasks if t.name is TaskName.SHUTDOWN]
        assert [t.phase for t in outcomes] == [TaskPhase.COMPLETE]
        for attempt in (1, 2, 3):
            assert (await pod.send(Shutdown(), attempt=attempt)).outcome.phase is TaskPhase.COMPLETE


async def test_the_clean_up_of_one_runner_never_touches_the_next(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        await instance.ready()
        create = CreateRunner(world_size=1, source=SOURCE, served_name="tiny")
        await asyncio.gather(pod.send(Shutdown()), pod.send(Shutdown(grace_seconds=5)), pod.send(create, 2))
        await pod.state(S.IDLE, 2)
        (engine,) = pod.engines()
        late = await pod.send(Shutdown(), 1)
        assert late.outcome.phase is TaskPhase.REJECTED
        await instance.download(2)
        await instance.all(LoadModel(), S.LOADED, 2)
        assert pod.engines() == [engine]


async def test_an_engine_that_cannot_start_is_tried_again_slowly_and_fails_the_epoch_that_uses_it(
    tmp_path: Path,
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nsys.stderr.write('loading\\n')\nimport no_such_module_at_all\n")
    async with group(tmp_path, 1, engine=f"{sys.executable} {broken}") as instance:
        pod = instance.pods[0]
        await pod.send(CreateRunner(world_size=1, source=SOURCE, served_name="tiny"))
        reason, message, _ = await failure_of(instance, 0)
        assert reason is Reason.ENGINE_CRASHED
        assert message.startswith("engine exited with code 1 in ")
        assert message.endswith("ModuleNotFoundError: No module named 'no_such_module_at_all'")
        assert await pod.status("/healthz") == 200


async def test_the_successor_tells_what_its_predecessor_was_doing(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        await instance.ready()
        incarnation = pod.report.incarnation
        pod.kill_whole()
        assert await pod.exit_code() == -signal.SIGKILL
        for _ in range(2):
            await pod.start()
            predecessor = pod.report.predecessor
            assert predecessor is not None
            assert (predecessor.incarnation, predecessor.epoch, predecessor.state) == (incarnation, 1, S.READY)
            assert (pod.report.epoch, pod.report.state) == (0, S.PENDING)
            # A second death before any epoch must not lose what is known of the first.
            os.kill(pod.pid, signal.SIGKILL)
            await pod.exit_code()


async def test_a_runner_that_was_shut_down_has_no_heir(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        await instance.ready()
        os.kill(pod.pid, signal.SIGTERM)
        assert await pod.exit_code() == 0
        assert [r.state for r in pod.reports][-1] is S.SHUTDOWN
        assert pod.report.draining
        await pod.start()
        assert pod.report.predecessor is None


async def test_a_group_that_is_deleted_while_idle_leaves_at_once_and_nobody_fails(tmp_path: Path) -> None:
    async with group(tmp_path, 2, MLX_RUNNER_GRACE_SECONDS="3600") as instance:
        await instance.ready()
        for pod in reversed(instance.pods):
            os.kill(pod.pid, signal.SIGTERM)
        for pod in instance.pods:
            assert await pod.exit_code() == 0
            assert all(r.failure is None for r in pod.reports)


async def test_sigterm_before_any_epoch_ends_the_supervisor(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        os.kill(instance.pods[0].pid, signal.SIGTERM)
        assert await instance.pods[0].exit_code() == 0


async def test_a_download_that_fails_leaves_the_runner_idle_and_the_next_attempt_runs(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        await instance.create(source="pvc://models/other")
        await pod.send(DownloadModel())
        outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, TaskPhase.FAILED)
        assert outcome.reason is Reason.MODEL_NOT_FOUND
        assert outcome.message == f"{tmp_path}/models/other (claim models) does not exist"
        assert pod.report.state is S.IDLE
        rejected = await pod.send(LoadModel())
        assert rejected.outcome.rejection is not None
        assert rejected.outcome.rejection.why == "the model is not available yet: DownloadModel comes first"

        (tmp_path / "models/tiny").rename(tmp_path / "models/other")
        await pod.send(DownloadModel(), attempt=2)
        await pod.outcome(TaskName.DOWNLOAD_MODEL, 1, TaskPhase.COMPLETE, attempt=2)
        assert pod.report.model_available
        assert pod.report.model is not None
        assert (pod.report.model.architecture, pod.report.model.layers) == ("qwen2", 4)


async def test_a_source_of_a_newer_operator_is_answered_by_a_clear_word(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        await instance.create(source="s3://bucket/model")
        await instance.pods[0].send(DownloadModel())
        outcome = await instance.pods[0].outcome(TaskName.DOWNLOAD_MODEL, 1, TaskPhase.FAILED)
        assert outcome.reason is Reason.SOURCE_UNSUPPORTED
        assert "s3://bucket/model" in (outcome.message or "")


async def test_tasks_that_are_not_for_this_runner_are_refused_with_the_reason(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        task = CreateRunner(world_size=1, source=SOURCE, served_name="tiny")
        refused: list[tuple[dict[str, Any], int, str]] = [
            ({"instance_uid": "other"}, 400, "instanceUid 'other' is not this runner's"),
            ({"rank": 1}, 400, "rank 1 is not this runner's: it is rank 0"),
            ({"protocol": 9}, 400, "protocol 9 is not spoken here: this runner speaks 1"),
            ({"task": task.model_copy(update={"world_size": 0})}, 400, "worldSize 0 has no rank 0"),
        ]
        for changes, status, word in refused:
            request = pod.request(task).model_copy(update=changes)
            assert (await pod.post(request))[0] == status
            assert word in (await pod.post(request))[1]
        async with pod.http.post(pod.url("/tasks"), data='{"task": {"name": "Dance"}}') as response:
            assert response.status == 400
            assert "task" in await response.text()
        assert pod.report.epoch == 0
        await pod.send(task, lease_transitions=4)
        status, text = await pod.post(pod.request(task, 2, lease_transitions=3))
        assert (status, "no longer the leader" in text) == (409, True)
        assert pod.report.epoch == 1


async def test_without_the_token_only_probes_and_metrics_answer(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        for header in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
            for path in ("/report", "/reports"):
                async with pod.http.get(pod.url(path), headers=header) as response:
                    assert response.status == 401
            async with pod.http.post(pod.url("/tasks"), headers=header, data="{}") as response:
                assert response.status == 401
        told = [line for line in pod.log.splitlines() if "requests without the right bearer token" in line]
        assert len(told) == 1, "six refused requests are one warning"
        assert "the last from 127." in told[0]
        async with pod.http.get(pod.url("/metrics"), headers={"Authorization": ""}) as response:
            assert 'mlx_runner_state{state="RunnerPending"} 1.0' in await response.text()
        assert (await pod.status("/healthz"), await pod.status("/readyz")) == (200, 503)


async def test_a_report_stream_beats_while_nothing_changes(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        seen = pod.report.seq
        await pod.until(lambda r: r.seq >= seen + 2, "second heartbeat")
        assert [r.seq for r in pod.reports] == sorted({r.seq for r in pod.reports})
        assert {r.instance_uid for r in pod.reports} == {UID}
        assert ORDER[pod.report.state] == 0


async def test_clients_that_send_half_a_request_or_never_read_hold_nobody_up(tmp_path: Path) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        connections = []
        for port, text in [
            (names.CONTROL_PORT, "POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Le"),
            (
                names.CONTROL_PORT,
                f"POST /tasks HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n{{",
            ),
            (names.CONTROL_PORT, f"GET /reports HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"),
            (names.CONTROL_PORT, "\x00\x01\x02\r\n\r\n"),
            (names.PUBLIC_PORT, "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"),
        ]:
            _, writer = await asyncio.open_connection(pod.host, port)
            writer.write(text.encode())
            connections.append(writer)
        await instance.ready()
        os.kill(pod.pid, signal.SIGTERM)
        assert await pod.exit_code() == 0
        for writer in connections:
            writer.close()
