"""An engine that dies, fails, freezes or never ends, beside real peers and under real supervisors."""

import asyncio
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import DeadlineSeconds, LoadModel, Sharding, StartWarmup, Task
from tests.faults import Fault, Layer, declare, fault

from .faulting import answering, ask, at_rest, confirm, engines_of, gone, heals, instance_of, met, send
from .supervisors import Group

S = RunnerState
WATCH_SECONDS = 10.0
"""Of every freeze, with the watch's own defaults: 2 s of state T, or 5 s without CPU time, and a look a second."""


def killed(number: signal.Signals, rank: int) -> Fault:
    # Of these, Python's faulthandler tells in its own words.
    words = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
    return Fault(
        id=f"engine-{number.name.lower()}",
        what=f"engine ended by {number.name}",
        injected=f"`kill -{number.name.removeprefix('SIG')}` of rank {rank}'s engine",
        layer=Layer.GROUP,
        rank=rank,
        state=S.READY,
        reason=Reason.ENGINE_CRASHED,
        says=f"engine killed by signal {number} ({number.name}) in RunnerReady"
        + (": Fatal Python error: …" if number in words else ""),
        within=1.0,
    )


SIGNALS = declare(
    killed(signal.SIGKILL, 1),
    killed(signal.SIGTERM, 0),
    killed(signal.SIGSEGV, 1),
    killed(signal.SIGABRT, 0),
    killed(signal.SIGBUS, 1),
    killed(signal.SIGILL, 0),
    killed(signal.SIGFPE, 1),
    killed(signal.SIGHUP, 0),
    killed(signal.SIGQUIT, 1),
)


async def test_an_engine_that_a_signal_ends_is_told_by_it_and_the_next_epoch_answers_the_same(
    tmp_path: Path, models: Path
) -> None:
    async with instance_of(SIGNALS[0], tmp_path, models) as instance:
        await instance.ready()
        answer = await ask(instance)
        for epoch, row in enumerate(SIGNALS, start=1):
            assert row.rank is not None
            engines = engines_of(instance)
            (victim,) = instance.pods[row.rank].engines()
            await at_rest(instance)
            reports = await confirm(row, instance, send(victim, getattr(signal, row.id.split("-")[1].upper())), epoch)
            failure = reports[row.rank].failure
            assert failure is not None
            assert (failure.signal, failure.exit_code) == (row.id.split("-")[1].upper(), None)
            await gone(engines)
            await instance.ready(epoch + 1)
            assert await ask(instance) == answer
            assert [len(pod.engines()) for pod in instance.pods] == [1, 1]


BUSY = Fault(
    id="engine-killed-busy",
    what="engine killed while the group answers",
    injected="`kill -KILL` of rank 1's engine, a stream running",
    layer=Layer.GROUP,
    state=S.RUNNING,
    reason=Reason.ENGINE_CRASHED,
    says="engine killed by signal 9 (SIGKILL) in RunnerRunning",
    within=1.0,
)
FROZEN = Fault(
    id="engine-stopped-idle",
    what="engine frozen while idle",
    injected="`kill -STOP` of rank 1's engine",
    layer=Layer.GROUP,
    state=S.READY,
    reason=Reason.RUNNER_STALLED,
    says="engine process stopped (state T for … s) in RunnerReady, step …, last progress … s ago",
    within=WATCH_SECONDS,
)
FROZEN_BUSY = replace(
    FROZEN,
    id="engine-stopped-busy",
    what="engine frozen while the group answers",
    injected="`kill -STOP` of rank 1's engine, a stream running",
    state=S.RUNNING,
    says=FROZEN.says.replace("Ready", "Running"),
)


@fault(
    BUSY,
    replace(BUSY, id="engine-killed-busy-tensor", sharding=Sharding.TENSOR),
    replace(BUSY, id="engine-killed-busy-rank-0", rank=0, injected="`kill -KILL` of rank 0's engine, a stream running"),
    replace(
        BUSY,
        id="engine-killed-busy-three",
        ranks=3,
        injected="`kill -KILL` of the engine in the middle, a stream running",
    ),
    FROZEN,
    FROZEN_BUSY,
    replace(FROZEN_BUSY, id="engine-stopped-busy-tensor", sharding=Sharding.TENSOR),
    replace(
        FROZEN_BUSY,
        id="engine-stopped-busy-rank-0",
        rank=0,
        injected="`kill -STOP` of rank 0's engine, a stream running",
    ),
)
async def test_an_engine_that_is_killed_or_frozen_is_the_cause_and_its_peers_the_consequence(
    tmp_path: Path, models: Path, row: Fault
) -> None:
    async with instance_of(row, tmp_path, models) as instance:
        await instance.ready()
        engines = engines_of(instance)
        assert row.rank is not None
        (victim,) = instance.pods[row.rank].engines()
        number = signal.SIGKILL if row.reason is Reason.ENGINE_CRASHED else signal.SIGSTOP
        if row.state is S.RUNNING:
            async with answering(instance):
                await confirm(row, instance, send(victim, number))
        else:
            await at_rest(instance)
            await confirm(row, instance, send(victim, number))
        await heals(instance, 2, engines)


NO_CPU = "engine used 0.0… s of CPU in … s while computing in RunnerRunning, process state S, step …"
RAISED = "RuntimeError: a fault of this test"
PLACES = {"connect": S.CONNECTING, "load": S.LOADING, "warmup": S.WARMING_UP, "step": S.RUNNING}


@fault(
    *(
        Fault(
            id=f"exception-{place}",
            what=f"Python exception in {words}",
            injected=f"{words} raises in the engine of rank 1",
            layer=Layer.GROUP,
            state=PLACES[place],
            reason=reason,
            says=RAISED,
            within=1.0,
            # Nobody is connected to a rank that fails to connect: the others are shut down by the operator.
            others=None if place == "connect" else Reason.PEER_LOST,
        )
        for place, words, reason in (
            ("connect", "connect", Reason.CONNECT_FAILED),
            ("load", "load", Reason.LOAD_FAILED),
            ("warmup", "warm-up", Reason.WARMUP_FAILED),
            ("step", "a step", Reason.ENGINE_CRASHED),
        )
    ),
    Fault(
        id="abort-step",
        what="abort in a step",
        injected="the engine's step calls `abort()` on rank 1",
        layer=Layer.GROUP,
        state=S.RUNNING,
        reason=Reason.ENGINE_CRASHED,
        says="engine killed by signal 6 (SIGABRT) in RunnerRunning: terminate called after throwing …",
        within=1.0,
    ),
    Fault(
        id="segfault-step",
        what="segmentation fault in a step",
        injected="the engine's step reads address 0 on rank 1",
        layer=Layer.GROUP,
        state=S.RUNNING,
        reason=Reason.ENGINE_CRASHED,
        says="engine killed by signal 11 (SIGSEGV) in RunnerRunning: Fatal Python error: Segmentation fault",
        within=1.0,
    ),
    Fault(
        id="exit-0",
        what="engine exits 0 although nobody told it to",
        injected="the engine's step calls `_exit(0)` on rank 0",
        layer=Layer.GROUP,
        rank=0,
        state=S.RUNNING,
        reason=Reason.ENGINE_CRASHED,
        says="engine exited with code 0 in RunnerRunning without having been told to",
        within=1.0,
    ),
    Fault(
        id="exit-3",
        what="engine exits with a code of its own",
        injected="the engine's load calls `_exit(3)` on rank 1",
        layer=Layer.GROUP,
        state=S.LOADING,
        reason=Reason.ENGINE_CRASHED,
        says="engine exited with code 3 in RunnerLoading…",
        within=1.0,
    ),
    Fault(
        id="hang-step",
        what="a step that never ends, without CPU time",
        injected="the engine's step waits for ever on rank 1",
        layer=Layer.GROUP,
        state=S.RUNNING,
        reason=Reason.RUNNER_STALLED,
        says=NO_CPU,
        within=WATCH_SECONDS,
    ),
    Fault(
        id="gil-step",
        what="a step that never ends and holds Python's lock",
        injected="the engine's step calls C's `pause()` with the GIL held on rank 0",
        layer=Layer.GROUP,
        rank=0,
        state=S.RUNNING,
        reason=Reason.RUNNER_STALLED,
        says=NO_CPU,
        within=WATCH_SECONDS,
    ),
)
async def test_a_fault_inside_the_engine_is_told_with_its_evidence(tmp_path: Path, models: Path, row: Fault) -> None:
    action, place = row.id.split("-")
    place = {"0": "step", "3": "load"}.get(place, place)
    plan = {"do": {"exception": "raise"}.get(action, action), "code": int(row.id[-1]) if action == "exit" else 0}
    async with instance_of(row, tmp_path, models) as instance:
        engines, began, request = await led_to(row, instance, place, plan)
        reports = await confirm(row, instance, began)
        if action == "exception":
            failure = next(r.failure for r in reports if r.rank == row.rank)
            assert failure is not None
            assert any("faulty_engine.py" in line for line in failure.diagnostics), "the place is told"
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await heals(instance, 2, engines)


async def led_to(
    row: Fault, instance: Group, place: str, plan: dict[str, Any]
) -> tuple[list[int], float, "asyncio.Task[Any]"]:
    """The group at the place where one rank has a fault: the engines, the time, and the request that is under way."""
    assert row.rank is not None
    victim = instance.pods[row.rank]
    await instance.create()
    await instance.download()
    await met(lambda: "engine started" in victim.log, "the imports are done")
    if place != "connect":
        await instance.connect()
    if place in ("warmup", "step"):
        await instance.all(LoadModel(), S.LOADED, 1)
    if place == "step":
        await instance.all(StartWarmup(), S.READY, 1)
    victim.plan(at={"warmup": "step"}.get(place, place), **plan)
    engines, began = engines_of(instance), time.monotonic()
    tasks: dict[str, Task] = {"connect": instance.peers(), "load": LoadModel(), "warmup": StartWarmup()}
    task = tasks.get(place)
    if task is not None:
        for pod in reversed(instance.pods):
            await pod.send(task)
    return engines, began, asyncio.create_task(ask(instance) if place == "step" else asyncio.sleep(0))


SHORT = {
    "gil-connect": DeadlineSeconds(connect=4.0),
    "hang-load": DeadlineSeconds(load=4.0),
    "spin-step": DeadlineSeconds(progress=4.0),
}


@fault(
    Fault(
        id="gil-connect",
        what="Python's lock held in connect",
        injected="MLX's ring waits for a rank that never comes",
        layer=Layer.GROUP,
        sharding=Sharding.TENSOR,
        rank=0,
        state=S.CONNECTING,
        reason=Reason.CONNECT_TIMEOUT,
        says="not connected within … s: still waiting for rank 1; ring port 8101 was seen listening",
        others=None,
        within=40.0,
    ),
    Fault(
        id="hang-load",
        what="a load that never ends",
        injected="the engine's load waits for ever on rank 1",
        layer=Layer.GROUP,
        state=S.LOADING,
        reason=Reason.LOAD_TIMEOUT,
        says="not loaded within … s: 0/? layers",
        within=600.0,
    ),
    Fault(
        id="spin-step",
        what="a step that never ends and burns CPU",
        injected="the engine's step is an endless loop on rank 1",
        layer=Layer.GROUP,
        state=S.RUNNING,
        reason=Reason.RUNNER_STALLED,
        says="engine made no step for … s in RunnerRunning, process state R, step …, last progress … s ago",
        within=120.0,
    ),
)
async def test_what_never_ends_misses_its_deadline(tmp_path: Path, models: Path, row: Fault) -> None:
    """The deadlines of `spec.deadlines`; here they are short, the row has the defaults."""
    async with instance_of(row, tmp_path, models) as instance:
        instance.deadlines = SHORT[row.id]
        if row.id == "gil-connect":
            await instance.create()
            await instance.download()
            await met(lambda: "engine started" in instance.pods[0].log, "the imports are done")
            engines, began = engines_of(instance), time.monotonic()
            await instance.pods[0].send(instance.peers())
            await confirm(row, instance, began)
        else:
            do, place = row.id.split("-")
            engines, began, request = await led_to(row, instance, place, {"do": do})
            await confirm(row, instance, began)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        instance.deadlines = DeadlineSeconds()
        await heals(instance, 2, engines)
