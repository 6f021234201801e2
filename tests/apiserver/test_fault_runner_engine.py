"""Engines that die, fail or freeze under real supervisors, as the operator tells it."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import aiohttp
import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.apiserver.faulting import comes_back, in_state, seen, started, stays_until_asked
from tests.apiserver.harness import World, condition
from tests.faults import Fault, Layer, fault

pytestmark = pytest.mark.asyncio(loop_scope="module")
S = RunnerState
SOON = 3.0
COMMAND = {S.CONNECTING: "Connect", S.LOADING: "Load", S.WARMING_UP: "Warmup"}
"""At which an engine is held, to be in a state."""
WHO = "rank 1/2 pod tiny-1 on node n2: "
AGAIN = "; restart 2/5 at …"


def row(
    name: str,
    what: str,
    injected: str,
    state: S,
    reason: Reason,
    says: str,
    *,
    rank: int = 1,
    ranks: int = 2,
    within: float = SOON,
) -> Fault:
    return Fault(
        id=name,
        what=what,
        injected=injected,
        layer=Layer.OPERATOR,
        state=state,
        reason=reason,
        says=says,
        ranks=ranks,
        rank=rank,
        within=within,
    )


def killed(state: S, where: str) -> Fault:
    return row(
        f"engine-killed-{where.replace(' ', '-')}",
        f"engine killed while {where}",
        "`kill -KILL` of rank 1's engine",
        state,
        Reason.ENGINE_CRASHED,
        f"{WHO}engine killed by signal 9 (SIGKILL) in {state}{'…' if state is S.LOADING else ''}{AGAIN}",
    )


@fault(
    killed(S.CONNECTING, "connecting"),
    killed(S.LOADING, "loading"),
    killed(S.WARMING_UP, "warming up"),
    killed(S.READY, "idle"),
    row(
        "engine-killed-idle-rank-0",
        "engine of rank 0 killed while idle",
        "`kill -KILL` of rank 0's engine",
        S.READY,
        Reason.ENGINE_CRASHED,
        f"rank 0/2 pod tiny-0 on node n1: engine killed by signal 9 (SIGKILL) in RunnerReady{AGAIN}",
        rank=0,
    ),
    row(
        "engine-killed-alone",
        "engine of the only runner killed",
        "`kill -KILL` of the engine",
        S.READY,
        Reason.ENGINE_CRASHED,
        f"rank 0/1 pod tiny-0 on node n1: engine killed by signal 9 (SIGKILL) in RunnerReady{AGAIN}",
        rank=0,
        ranks=1,
    ),
    row(
        "engine-killed-one-of-three",
        "engine of one of three runners killed",
        "`kill -KILL` of rank 1's engine",
        S.READY,
        Reason.ENGINE_CRASHED,
        f"rank 1/3 pod tiny-1 on node n2: engine killed by signal 9 (SIGKILL) in RunnerReady{AGAIN}",
        ranks=3,
    ),
)
async def test_a_killed_engine_is_told_with_the_state_that_it_was_in(shared: World, row: Fault) -> None:
    assert row.state is not None
    await started(shared, row, hold=COMMAND.get(row.state, ""))
    await in_state(shared, row, row.state)
    began = time.monotonic()
    shared.kubelet.kill_engine(f"tiny-{row.rank}")
    await seen(shared, row, since=began)
    await comes_back(shared)


@fault(
    row(
        "engine-killed-before-it-began",
        "engine killed before the group connects",
        "`kill -KILL` of the engine, while the model is looked for",
        S.IDLE,
        Reason.ENGINE_CRASHED,
        f"rank 0/1 pod tiny-0 on node n1: engine killed by signal 9 (SIGKILL) in RunnerIdle{AGAIN}",
        rank=0,
        ranks=1,
    )
)
async def test_an_engine_killed_before_the_group_connects_is_told(shared: World, row: Fault) -> None:
    model = shared.kubelet.folder / "models" / "tiny"
    hidden = model.rename(model.with_name("hidden"))
    try:
        await started(shared, row, hold="Connect")
        await shared.until(lambda i: condition(i, ConditionType.STALLED).get("status") == "True", "no model is found")
        await in_state(shared, row, S.IDLE)
        began = time.monotonic()
        shared.kubelet.kill_engine("tiny-0")
        await seen(shared, row, since=began)
    finally:
        hidden.rename(model)
    await comes_back(shared)


@fault(
    row(
        "engine-killed-busy-seen",
        "engine killed while the group answers",
        "`kill -KILL` of rank 0's engine, a stream running",
        S.RUNNING,
        Reason.ENGINE_CRASHED,
        f"rank 0/2 pod tiny-0 on node n1: engine killed by signal 9 (SIGKILL) in RunnerRunning{AGAIN}",
        rank=0,
    ),
    row(
        "engine-aborts",
        "engine aborts on a request",
        "rank 0's engine calls `abort()` for a certain prompt",
        S.RUNNING,
        Reason.ENGINE_CRASHED,
        f"rank 0/2 pod tiny-0 on node n1: engine killed by signal 6 (SIGABRT) in RunnerRunning…{AGAIN}",
        rank=0,
    ),
    row(
        "engine-makes-no-step",
        "a step that never ends",
        "rank 0's engine never answers a request",
        S.RUNNING,
        Reason.RUNNER_STALLED,
        f"rank 0/2 pod tiny-0 on node n1: engine made no step for … s in RunnerRunning, process state S, step …{AGAIN}",
        rank=0,
        within=135.0,
    ),
    row(
        "exception-step-seen",
        "Python exception in a step",
        "a step raises in rank 0's engine",
        S.RUNNING,
        Reason.ENGINE_CRASHED,
        f"rank 0/2 pod tiny-0 on node n1: ValueError: cannot broadcast shapes (4,) and (3,), in RunnerRunning{AGAIN}",
        rank=0,
    ),
)
async def test_an_engine_that_ends_or_hangs_with_a_request_is_told(shared: World, row: Fault) -> None:
    await started(shared, row, deadlines={"progress": "2s"})
    match row.id:
        case "engine-killed-busy-seen":
            shared.kubelet.plan(tokens=10_000, token_seconds=0.02)
        case "engine-aborts":
            shared.kubelet.plan(hold="Generate")
        case "engine-makes-no-step":
            shared.kubelet.plan(hang="Generate")
        case _:
            shared.kubelet.plan(hold="Generate")
    async with asking(shared):
        await in_state(shared, row, S.RUNNING)
        began = time.monotonic()
        match row.id:
            case "engine-killed-busy-seen":
                shared.kubelet.kill_engine("tiny-0")
            case "engine-aborts":
                shared.kubelet.plan(abort="question")
            case "exception-step-seen":
                message = "ValueError: cannot broadcast shapes (4,) and (3,)"
                shared.kubelet.plan(fail={"on": "Generate", "reason": Reason.ENGINE_CRASHED, "message": message})
        await seen(shared, row, since=began)
    await comes_back(shared)


@contextlib.asynccontextmanager
async def asking(place: World) -> AsyncIterator[None]:
    """Within it a client waits for an answer; what becomes of it is another test's business."""

    async def ask() -> None:
        body = {"model": "tiny", "prompt": "a question", "max_tokens": 10_000, "stream": True}
        url = f"http://{place.kubelet.of('tiny-0').ip}:{names.PUBLIC_PORT}/v1/completions"
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            await answer.read()

    asked = asyncio.create_task(ask())
    try:
        yield
    finally:
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


def failing(where: str, state: S, reason: Reason, message: str) -> Fault:
    return row(
        f"exception-{where.lower()}-seen",
        f"Python exception in {where}",
        f"{where} raises in rank 1's engine",
        state,
        reason,
        f"{WHO}{message}, in {state}{AGAIN}",
    )


CRASHES = {
    "exception-connect-seen": "OSError: [Errno 98] Address already in use",
    "exception-load-seen": "RuntimeError: [load_safetensors] Invalid json header length",
    "exception-warm-up-seen": "ValueError: cannot broadcast shapes (4,) and (3,)",
}


@fault(
    failing("connect", S.CONNECTING, Reason.CONNECT_FAILED, CRASHES["exception-connect-seen"]),
    failing("load", S.LOADING, Reason.LOAD_FAILED, CRASHES["exception-load-seen"]),
    failing("warm-up", S.WARMING_UP, Reason.WARMUP_FAILED, CRASHES["exception-warm-up-seen"]),
)
async def test_an_exception_is_told_in_its_own_words(shared: World, row: Fault) -> None:
    assert row.state is not None
    on = COMMAND[row.state]
    await started(shared, row, hold=on)
    await in_state(shared, row, row.state)
    began = time.monotonic()
    shared.kubelet.plan(fail={"on": on, "reason": row.reason, "message": CRASHES[row.id]}, rank=1)
    await seen(shared, row, since=began)
    await comes_back(shared)


LAST_WORDS = "ImportError: libopenblas.so.0: cannot open shared object file"


@fault(
    row(
        "engine-exits",
        "engine ends with an exit code",
        "rank 1's engine exits with code 1 while it loads, after a line on stderr",
        S.LOADING,
        Reason.ENGINE_CRASHED,
        f"{WHO}engine exited with code 1 in RunnerLoading…: {LAST_WORDS}{AGAIN}",
    )
)
async def test_an_exit_code_is_told_with_the_last_words(shared: World, row: Fault) -> None:
    await started(shared, row, hold="Load")
    await in_state(shared, row, S.LOADING)
    began = time.monotonic()
    shared.kubelet.plan(exit={"on": "Load", "code": 1}, stderr=LAST_WORDS, rank=1)
    await seen(shared, row, since=began)
    await comes_back(shared)


@fault(
    row(
        "engine-frozen",
        "engine frozen",
        "`kill -STOP` of rank 1's engine",
        S.READY,
        Reason.RUNNER_STALLED,
        f"{WHO}engine process stopped (state T for … s) in RunnerReady, step …, last progress … s ago{AGAIN}",
        within=12.0,
    )
)
async def test_a_frozen_engine_is_told(shared: World, row: Fault) -> None:
    await started(shared, row)
    began = time.monotonic()
    shared.kubelet.kill_engine("tiny-1", signal.SIGSTOP)
    await seen(shared, row, since=began)
    await comes_back(shared)


@fault(
    row(
        "engine-oom-seen",
        "the kernel kills an engine for memory",
        "SIGKILL of rank 1's engine and `oom_kill 1` in its cgroup's memory.events",
        S.LOADING,
        Reason.OUT_OF_MEMORY,
        f"{WHO}engine killed by signal 9 (SIGKILL) in RunnerLoading…, memory limit 512Mi, oom_kill 1{AGAIN}",
    )
)
async def test_an_engine_killed_for_memory_is_told_with_its_limit(shared: World, row: Fault) -> None:
    await started(shared, row, hold="Load", runner={"resources": {"limits": {"memory": "512Mi"}}})
    await in_state(shared, row, S.LOADING)
    began = time.monotonic()
    shared.kubelet.oom("tiny-1")
    await seen(shared, row, since=began)
    await comes_back(shared)


@fault(
    row(
        "peer-lost-only",
        "a connection between two runners is lost, and neither knows why",
        "rank 0's engine reports that rank 1 closed its connection, and ends",
        S.WARMING_UP,
        Reason.PEER_LOST,
        f"rank 0/2 pod tiny-0 on node n1: connection to rank 1 closed, in RunnerWarmingUp{AGAIN}",
        rank=0,
        within=5.0,
    )
)
async def test_a_lost_peer_is_the_cause_only_where_nobody_says_why(shared: World, row: Fault) -> None:
    await started(shared, row, hold="Warmup")
    await in_state(shared, row, S.WARMING_UP)
    began = time.monotonic()
    words = "connection to rank 1 closed"
    shared.kubelet.plan(fail={"on": "Warmup", "reason": Reason.PEER_LOST, "message": words, "peer": 1}, rank=0)
    await seen(shared, row, since=began)
    await comes_back(shared)


@fault(
    replace(
        row(
            "budget-exhausted",
            "a group that fails more often than it may",
            "`kill -KILL` of rank 1's engine, with `maxRestarts: 1` and one restart spent",
            S.READY,
            Reason.RESTART_BUDGET_EXHAUSTED,
            f"{WHO}engine killed by signal 9 (SIGKILL) in RunnerReady; no restart: the budget of 1 is spent; …",
        ),
        condition=ConditionType.READY,
        then="the user: a change of the spec, or the annotation `mlx-operator.dev/retry`",
    )
)
async def test_a_spent_budget_is_told_with_the_last_failure(shared: World, row: Fault) -> None:
    await started(shared, row, restartPolicy={"maxRestarts": 1})
    began = time.monotonic()
    shared.kubelet.kill_engine("tiny-1")
    await seen(shared, row, since=began)
    await stays_until_asked(shared)
