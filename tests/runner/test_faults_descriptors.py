"""What happens without file descriptors, to a supervisor and to an engine."""

import os
import resource
import signal
import time
from pathlib import Path

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import (
    CreateRunner,
    DeadlineSeconds,
)
from tests.faults import Fault, Layer, fault

from .faulting import confirm, engines_of, gone, heals, instance_of, met
from .supervisors import SOURCE, group

S = RunnerState


def limit_descriptors(pid: int, count: int) -> tuple[int, int]:
    """Of a running process; what it was before."""
    return resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


NO_DESCRIPTORS = Fault(
    id="descriptors-supervisor",
    what="supervisor out of file descriptors",
    injected="RLIMIT_NOFILE of rank 0's PID 1 below what it has open; then its engine is killed",
    layer=Layer.STAND_IN,
    ranks=1,
    rank=0,
    state=S.PENDING,
    reason=Reason.ENGINE_CRASHED,
    says="the engine cannot be started: [Errno 24] Too many open files…",
    others=None,
    within=1.0,
)


@fault(NO_DESCRIPTORS)
async def test_a_supervisor_without_descriptors_tells_it_and_goes_on_once_it_has_some(
    tmp_path: Path, row: Fault
) -> None:
    async with group(tmp_path, 1) as instance:
        pod = instance.pods[0]
        await instance.ready()
        await met(lambda: bool(pod.spares()), "a spare engine")
        await pod.status("/healthz")  # a connection that the next requests use again
        before = limit_descriptors(pod.pid, 3)
        engines = pod.children()
        for engine in engines:
            os.kill(engine, signal.SIGKILL)
        killed = await pod.state(S.FAILED, 1)
        assert killed.failure is not None
        assert killed.failure.signal == "SIGKILL", "what needs no descriptor is told as ever"
        await gone(engines)
        began = time.monotonic()
        await pod.send(CreateRunner(world_size=1, source=SOURCE, served_name="tiny"), 2)
        await confirm(row, instance, began, 2)
        limit_descriptors(pod.pid, before[0])
        await instance.ready(3)
        assert len(pod.engines()) == 1


STARVED = (
    Fault(
        id="descriptors-dialer",
        what="engine out of file descriptors",
        injected="RLIMIT_NOFILE of rank 1's engine below what it has open, before it connects",
        layer=Layer.GROUP,
        state=S.CONNECTING,
        reason=Reason.CONNECT_TIMEOUT,
        says="not connected within … s: still waiting for rank 0 at … (too many open files)",
        others=Reason.CONNECT_TIMEOUT,
        within=40.0,
    ),
    Fault(
        id="descriptors-listener",
        what="engine out of file descriptors",
        injected="the same with rank 0's engine, once it listens",
        layer=Layer.GROUP,
        rank=0,
        state=S.CONNECTING,
        reason=Reason.CONNECT_TIMEOUT,
        says="not connected within … s: still waiting for rank 1 at … (no connection of it was accepted); "
        "refused: a connection that could not be accepted: too many open files",
        others=Reason.CONNECT_TIMEOUT,
        within=40.0,
    ),
)


@fault(*STARVED)
async def test_an_engine_without_descriptors_says_so_when_its_deadline_comes(
    tmp_path: Path, models: Path, row: Fault
) -> None:
    async with instance_of(row, tmp_path, models, real=None) as instance:
        assert row.rank is not None
        victim, other = instance.pods[row.rank], instance.pods[1 - row.rank]
        instance.deadlines = DeadlineSeconds(connect=5.0)
        await instance.create()
        await instance.download()
        engines = engines_of(instance)
        await met(lambda: all("engine started" in pod.log for pod in instance.pods), "the imports are done")
        began = time.monotonic()
        if row.rank == 0:
            await victim.send(instance.peers())
            await victim.until(lambda r: r.waiting_for == (1,), "it listens")
            limit_descriptors(victim.engines()[0], 3)
            await other.send(instance.peers())
        else:
            limit_descriptors(victim.engines()[0], 3)
            for pod in instance.pods:
                await pod.send(instance.peers())
        await confirm(row, instance, began)
        instance.deadlines = DeadlineSeconds()
        await heals(instance, 2, engines)
