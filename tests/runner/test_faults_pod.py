"""What happens to a whole pod: its supervisor, its memory, its disk, its clock, and SIGTERM."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import GroupFailure
from mlx_operator_api.tasks import (
    HEARTBEAT_SECONDS,
    DeadlineSeconds,
    LoadModel,
    RunnerReport,
    Shutdown,
    StartWarmup,
)
from mlx_runner.supervisor.watch import read_process
from tests.faults import Fault, Layer, declare, fault
from tests.unit.scenes import ready, see

from .faulting import answering, ask, engines_of, gone, heals, instance_of, met, send
from .supervisors import FAKE_ENGINE, PATIENCE, Group, group

S = RunnerState


# -- the supervisor
@fault(
    Fault(
        id="supervisor-killed",
        what="supervisor killed",
        injected="`kill -KILL` of rank 1's PID 1: its engine goes with it",
        layer=Layer.GROUP,
        state=S.READY,
        reason=Reason.CONTAINER_CRASHED,
        says="container ended with exit code 137 (SIGKILL) in RunnerReady",
        within=1.0,
    ),
    Fault(
        id="pod-oom",
        what="the kernel kills the whole pod for memory (cgroup v2)",
        injected="`kill -KILL` of rank 1's PID 1 and engine together",
        layer=Layer.GROUP,
        state=S.READY,
        reason=Reason.OUT_OF_MEMORY,
        says="container ended with exit code 137 (SIGKILL) in RunnerReady, OOMKilled, no memory limit",
        within=1.0,
    ),
)
async def test_a_supervisor_that_dies_takes_its_engine_along_and_its_successor_tells_what_it_did(
    tmp_path: Path, models: Path, row: Fault
) -> None:
    async with instance_of(row, tmp_path, models) as instance:
        leader, victim = instance.pods
        await instance.ready()
        incarnation, engines = victim.report.incarnation, victim.children()
        began = time.monotonic()
        if row.reason is Reason.OUT_OF_MEMORY:
            victim.kill_whole()
        else:
            send(victim.pid, signal.SIGKILL)
        lost = await leader.state(S.FAILED, 1)
        assert lost.failure is not None
        assert (lost.failure.reason, lost.peer) == (row.others, 1)
        row.took(time.monotonic() - began)
        assert await victim.exit_code() == -signal.SIGKILL
        await gone_or_zombie(engines)
        await victim.start()
        predecessor = victim.report.predecessor
        assert predecessor is not None
        assert (predecessor.incarnation, predecessor.epoch, predecessor.state) == (incarnation, 1, row.state)
        why = "OOMKilled" if row.reason is Reason.OUT_OF_MEMORY else "Error"
        found = container_decision(lost, why)
        assert (found.rank, found.consequences) == (row.rank, (0,))
        row.check(row.state, found.reason, found.message.partition(": ")[2])
        await instance.ready(2)
        assert await ask(instance)


def container_decision(consequence: RunnerReport, why: str) -> GroupFailure:
    """The operator's rules on rank 0's report and on what the kubelet says of rank 1's container."""
    cluster = ready(2)
    cluster.kill_container(1, why)
    assert consequence.failure is not None
    cluster.supervisor(0).fail(Reason.PEER_LOST, consequence.failure.message, peer=consequence.peer)
    return see(cluster)


async def gone_or_zombie(pids: list[int]) -> None:
    """Orphans of a dead supervisor go to the reaper of this machine, which is not ours."""
    await met(lambda: all((p := read_process(pid)) is None or p.state == "Z" for pid in pids), f"{pids} are dead")


SILENT = Fault(
    id="supervisor-stopped",
    what="supervisor frozen",
    injected="`kill -STOP` of rank 1's PID 1",
    layer=Layer.GROUP,
    state=S.READY,
    reason=Reason.RUNNER_UNREACHABLE,
    says="its supervisor cannot be reached, silent since …",
    others=None,
    within=10.0,
    then="by itself: its engine serves on; after `deadlines.unreachable` (8 s) the next epoch, which waits for it",
)


@fault(SILENT)
async def test_a_stopped_supervisor_is_silent_and_goes_on_where_it_was(
    tmp_path: Path, models: Path, row: Fault
) -> None:
    async with instance_of(row, tmp_path, models) as instance:
        pod = instance.pods[1]
        await instance.ready()
        engines = pod.engines()
        send(pod.pid, signal.SIGSTOP)
        heard = len(pod.reports)
        assert await ask(instance), "requests need no supervisor of a rank above 0"
        await asyncio.sleep(HEARTBEAT_SECONDS * 2)
        assert len(pod.reports) <= heard + 1, "a stopped supervisor says nothing"
        os.kill(pod.pid, signal.SIGCONT)
        seen = pod.report.seq
        await pod.until(lambda r: r.seq > seen and r.state is S.READY, "the next heartbeat")
        assert (pod.engines(), pod.report.epoch, pod.report.failure) == (engines, 1, None)
        assert await ask(instance)
        cluster = ready(2)
        cluster.lose_stream("tiny-1")
        cluster.pods["tiny-1"].partitioned = True
        cluster.wait(7)
        cluster.reconcile()
        assert not cluster.status.history
        cluster.wait(2)
        found = see(cluster)
        assert found.rank == row.rank
        row.check(row.state, found.reason, found.message.partition(": ")[2])


# -- its disk (its memory: test_faults_memory.py, its descriptors: test_faults_descriptors.py)
def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@pytest.fixture
def small_volumes(tmp_path: Path) -> Iterator[list[Path]]:
    """The state volumes of two pods, 64 KiB each."""
    if not can_mount():
        pytest.skip("needs root and mount(8)")
    places = [tmp_path / f"pod-{rank}" / "state" for rank in range(2)]
    try:
        for place in places:
            place.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "state", place], check=True, timeout=20)
        yield places
    finally:
        for place in places:
            subprocess.run(["umount", place], check=False, timeout=20)


def fill(volume: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (volume / "other").write_bytes(bytes(1024 * 1024))


def make_read_only(volume: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", volume], check=True, timeout=20)


DISK = {"disk-full": fill, "disk-read-only": make_read_only}


@fault(
    Fault(
        id="disk-full",
        what="state volume full",
        injected="a file fills the volume (64 KiB) of both pods",
        layer=Layer.GROUP,
        state=None,
        reason=None,
        then="nothing fails; but a successor of this supervisor would not know its last state, as the log says",
    ),
    Fault(
        id="disk-read-only",
        what="state volume turned read-only",
        injected="`mount -o remount,ro` in both pods",
        layer=Layer.GROUP,
        state=None,
        reason=None,
        then="nothing fails; a supervisor that starts there exits 2 and names the variable",
    ),
)
async def test_a_state_volume_that_cannot_be_written_stops_nothing(
    tmp_path: Path, models: Path, small_volumes: list[Path], row: Fault
) -> None:
    async with instance_of(row, tmp_path, models) as instance:
        for volume in small_volumes:
            DISK[row.id](volume)
        await instance.ready()
        assert await ask(instance)
        engines = engines_of(instance)
        os.kill(instance.pods[1].engines()[0], signal.SIGKILL)
        for pod in instance.pods:
            assert (await pod.state(S.FAILED, 1)).failure is not None
            assert "a successor will not know of this runner" in pod.log
        await heals(instance, 2, engines)
        if row.id == "disk-read-only":
            pod = instance.pods[1]
            os.kill(pod.pid, signal.SIGTERM)
            assert await pod.exit_code() == 0
            pod.spawn()
            assert await pod.exit_code() == 2
            assert "is no writable directory: mount an emptyDir there" in pod.log


# -- its clock
@fault(
    Fault(
        id="clock-jumps",
        what="wall clock jumps",
        injected="the supervisor reads a wall clock that goes 1 h back, then 1 day ahead (no clock of the node is set)",
        layer=Layer.STAND_IN,
        state=None,
        reason=None,
        then="nothing fails: what waits reads the monotonic clock",
    )
)
async def test_a_clock_that_jumps_fails_nothing_and_deadlines_stay_what_they_are(tmp_path: Path, row: Fault) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    roots = [Path(__file__).with_name("clock"), *(Path(__file__).parents[2] / part for part in ("api", "runner_image"))]
    environment = {"WALL_CLOCK": str(clock), "PYTHONPATH": os.pathsep.join(map(str, roots))}
    async with group(tmp_path, 2, engine=FAKE_ENGINE, models=None, **environment) as instance:
        instance.deadlines = DeadlineSeconds(connect=60.0, load=60.0, progress=60.0)
        await instance.create()
        await instance.download()
        await instance.pods[0].send(instance.peers())
        await instance.pods[0].until(lambda r: r.waiting_for == (1,), "a rank that is waited for")
        clock.write_text("-3600")
        await instance.pods[1].send(instance.peers())
        for pod in instance.pods:
            report = await pod.state(S.CONNECTED, 1)
            assert report.since < datetime.now(UTC) - timedelta(minutes=50), "the jump was seen"
        clock.write_text("86400")
        await instance.all(LoadModel(), S.LOADED, 1)
        await instance.all(StartWarmup(), S.READY, 1)
        seen = [pod.report.seq for pod in instance.pods]
        for pod, seq in zip(instance.pods, seen, strict=True):
            await pod.until(lambda r, seq=seq: r.seq >= seq + 2, "heartbeats")  # type: ignore[misc]
            assert all(r.failure is None for r in pod.reports)
        os.kill(instance.pods[1].engines()[0], signal.SIGKILL)
        assert (await instance.pods[1].state(S.FAILED, 1)).failure is not None
        await instance.ready(2)


# -- SIGTERM
(TERM,) = declare(
    Fault(
        id="sigterm",
        what="SIGTERM to the supervisor, in every state",
        injected="`kill -TERM` of PID 1 in each of the states",
        layer=Layer.STAND_IN,
        state=None,
        reason=None,
        then="exit 0, the engine gone, RunnerShutdown (a failure stays); running requests end within the grace period",
    )
)


@pytest.mark.parametrize("state", list(S), ids=str)
async def test_sigterm_ends_the_pod_in_good_order_in_every_state(tmp_path: Path, state: RunnerState) -> None:
    async with led_to_state(tmp_path, state) as instance:
        pod = instance.pods[0]
        children = pod.children()
        os.kill(pod.pid, signal.SIGTERM)
        assert await pod.exit_code() == 0, TERM.id
        await gone(children)
        last = pod.report
        kept = state in (S.PENDING, S.FAILED)
        assert last.state is (state if kept else S.SHUTDOWN)
        assert (last.failure is not None) == (state is S.FAILED)


@contextlib.asynccontextmanager
async def led_to_state(home: Path, state: RunnerState) -> AsyncIterator[Group]:
    """A group whose rank 0 is in this state, and stays there."""
    hang = {S.CONNECTING: "Connect", S.LOADING: "Load", S.WARMING_UP: "Warmup"}.get(state)
    async with group(home, 2 if state in (S.CONNECTING, S.CONNECTED) else 1) as instance:
        pod = instance.pods[0]
        pod.plan(token_seconds=0.05, **({"hang": hang} if hang else {}))
        if state is S.PENDING:
            yield instance
            return
        await instance.create()
        await instance.download()
        if state is S.CONNECTING:
            await pod.send(instance.peers())
        elif state is S.CONNECTED:
            await instance.connect()
        elif state is not S.IDLE:
            await pod.send(LoadModel())
            if state is not S.LOADING:
                await pod.state(S.LOADED, 1)
        if state in (S.WARMING_UP, S.READY, S.RUNNING, S.FAILED, S.SHUTTING_DOWN, S.SHUTDOWN):
            await pod.send(StartWarmup())
        if state in (S.READY, S.RUNNING, S.FAILED, S.SHUTTING_DOWN, S.SHUTDOWN):
            await pod.state(S.READY, 1)
        if state is S.FAILED:
            os.kill(pod.engines()[0], signal.SIGKILL)
        if state is S.SHUTDOWN:
            await instance.shut_down()
        async with answering(instance) if state in (S.RUNNING, S.SHUTTING_DOWN) else contextlib.nullcontext():
            if state is S.SHUTTING_DOWN:
                await pod.send(Shutdown(grace_seconds=PATIENCE))
            await pod.state(state, 1)
            yield instance
