"""Steps that never end, under real supervisors, as the operator tells it. The rows have the default deadlines."""

import time
from dataclasses import replace

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from tests.apiserver.faulting import comes_back, in_state, seen, started
from tests.apiserver.harness import World
from tests.faults import Fault, Layer, fault

pytestmark = pytest.mark.asyncio(loop_scope="module")
S = RunnerState
CONNECT = Fault(
    id="connect-timeout",
    what="a runner that does not connect",
    injected="rank 1's engine hangs while it connects",
    layer=Layer.OPERATOR,
    state=S.CONNECTING,
    reason=Reason.CONNECT_TIMEOUT,
    says="rank 1/2 pod tiny-1 on node n2: not connected within 2 s: the engine named no rank that it waits for, "
    "in RunnerConnecting; restart 2/5 at …",
    others=Reason.CONNECT_TIMEOUT,
    within=45.0,
)


@fault(
    CONNECT,
    replace(
        CONNECT,
        id="load-timeout",
        what="a shard that is not loaded in time",
        injected="rank 1's engine hangs while it loads",
        state=S.LOADING,
        reason=Reason.LOAD_TIMEOUT,
        says="rank 1/2 pod tiny-1 on node n2: not loaded within 2 s: 0/? layers, in RunnerLoading; restart 2/5 at …",
        within=605.0,
    ),
    replace(
        CONNECT,
        id="warmup-timeout",
        what="a warm-up that does not end",
        injected="rank 1's engine hangs while it warms up",
        state=S.WARMING_UP,
        reason=Reason.WARMUP_TIMEOUT,
        says="rank 1/2 pod tiny-1 on node n2: warm-up not done within 2 s, step …, in RunnerWarmingUp; "
        "restart 2/5 at …",
        within=305.0,
    ),
)
async def test_a_missed_deadline_is_told_with_what_was_waited_for(shared: World, row: Fault) -> None:
    command, name = {
        "connect-timeout": ("Connect", "connect"),
        "load-timeout": ("Load", "load"),
        "warmup-timeout": ("Warmup", "warmup"),
    }[row.id]
    await started(shared, row, hold=command, deadlines={name: "2s"})
    assert row.state is not None
    await in_state(shared, row, row.state)
    await seen(shared, row, since=time.monotonic())
    await comes_back(shared)
