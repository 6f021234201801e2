"""Supervisors that are silent, gone, or not to be understood, as the operator tells it."""

import asyncio
import signal
import time

import pytest

from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import Sharding
from tests.apiserver import injection
from tests.apiserver.faulting import comes_back, failed_before, in_state, seen, started, stays_until_asked
from tests.apiserver.harness import World
from tests.faults import Fault, Layer, fault

pytestmark = pytest.mark.asyncio(loop_scope="module")
S = RunnerState


@fault(
    Fault(
        id="supervisor-frozen",
        what="a supervisor that does not answer any more",
        injected="`kill -STOP` of rank 1's supervisor",
        layer=Layer.OPERATOR,
        state=S.READY,
        reason=Reason.RUNNER_UNREACHABLE,
        says="rank 1/2 pod tiny-1 on node n2: its supervisor cannot be reached, silent since …; restart 2/5 at …",
        within=25.0,
    )
)
async def test_a_silent_supervisor_is_told_since_when(shared: World, row: Fault) -> None:
    await started(shared, row, deadlines={"unreachable": "3s"})
    frozen = shared.kubelet.of("tiny-1").process
    assert frozen is not None
    began = time.monotonic()
    frozen.send_signal(signal.SIGSTOP)
    try:
        await seen(shared, row, since=began)
    finally:
        frozen.send_signal(signal.SIGCONT)
    await comes_back(shared)


@fault(
    Fault(
        id="container-killed",
        what="a container killed as a whole",
        injected="`kill -KILL` of rank 1's supervisor and engine; the kubelet starts the container again",
        layer=Layer.OPERATOR,
        state=S.READY,
        reason=Reason.CONTAINER_CRASHED,
        says="rank 1/2 pod tiny-1 on node n2: container ended with exit code 137 (SIGKILL) in RunnerReady; "
        "restart 2/5 at …",
        within=8.0,
    )
)
async def test_a_container_that_ended_is_told_with_the_kubelets_word(shared: World, row: Fault) -> None:
    await started(shared, row)
    began = time.monotonic()
    shared.kubelet.kill("tiny-1")
    await seen(shared, row, since=began)
    await comes_back(shared)


@fault(
    Fault(
        id="both-containers-killed",
        what="both ranks lost at once",
        injected="`kill -KILL` of the supervisors and engines of both ranks; rank 0's kubelet tells of it later",
        layer=Layer.OPERATOR,
        state=S.READY,
        reason=Reason.CONTAINER_CRASHED,
        says="rank 1/2 pod tiny-1 on node n2: container ended with exit code 137 (SIGKILL) in RunnerReady; "
        "restart 2/5 at …",
        others=Reason.CONTAINER_CRASHED,
        within=8.0,
    )
)
async def test_of_two_ranks_lost_at_once_the_first_told_is_the_cause_and_the_other_has_its_own(
    shared: World, row: Fault
) -> None:
    await started(shared, row)
    later = shared.kubelet.silent["tiny-0"] = asyncio.Event()
    began = time.monotonic()
    pods = ("tiny-0", "tiny-1")
    for name in pods:
        # Stopped before any of them dies: nobody lives to see the other go.
        shared.kubelet.kill_engine(name, signal.SIGSTOP)
        injection.freeze(shared, name)
    for name in pods:
        shared.kubelet.kill(name)
    await shared.until(lambda i: bool(i["status"].get("history")), "the first end is told")
    later.set()
    instance = await seen(shared, row, since=began)
    (told,) = instance["status"]["history"]
    assert (told["rank"], told.get("consequences", [])) == (1, []), (
        "nothing followed from the other: it ended by itself"
    )
    own = [runner["lastFailure"] for runner in instance["status"]["runners"]]
    assert [(failure["reason"], failure["exitCode"]) for failure in own] == [(Reason.CONTAINER_CRASHED, 137)] * 2
    assert instance["status"]["restarts"] == 2, "one failure"
    await comes_back(shared)


@fault(
    Fault(
        id="supervisor-never-answers",
        what="a container that runs, and nobody answers in it",
        injected="rank 1's supervisor listens nowhere from its start",
        layer=Layer.OPERATOR,
        state=None,
        reason=Reason.RUNNER_UNREACHABLE,
        condition=ConditionType.READY,
        says="rank 1/2 pod tiny-1 on node n2: its container runs, but its supervisor was not reached within … s: …",
        within=30.0,
        then="the user: as the message says; then by itself",
    )
)
async def test_a_supervisor_that_never_answered_is_told(shared: World, row: Fault) -> None:
    shared.kubelet.plan(deaf=True, rank=1)
    began = time.monotonic()
    await shared.create(deadlines={"unreachable": "1s"})
    await seen(shared, row, since=began)
    shared.kubelet.plan()
    shared.kubelet.kill("tiny-1")
    await shared.until_ready()


@fault(
    Fault(
        id="protocol-mismatch",
        what="a runner image of another age",
        injected="rank 1's reports say protocol 99",
        layer=Layer.OPERATOR,
        state=None,
        reason=Reason.PROTOCOL_MISMATCH,
        condition=ConditionType.READY,
        says="rank 1/2 pod tiny-1 on node n2: its supervisor speaks protocol 99, this operator …; …",
        within=8.0,
        then="the user: another image; then by itself",
    ),
    Fault(
        id="report-undecodable",
        what="a report that cannot be read",
        injected="rank 1's reports name a state that no release knows",
        layer=Layer.OPERATOR,
        state=None,
        reason=Reason.REPORT_UNDECODABLE,
        condition=ConditionType.READY,
        says="rank 1/2 pod tiny-1 on node n2: report cannot be decoded: state: …",
        within=8.0,
    ),
)
async def test_a_supervisor_that_is_not_understood_is_told_and_picked_up_once_it_is(shared: World, row: Fault) -> None:
    fault = {"protocol": 99} if row.reason is Reason.PROTOCOL_MISMATCH else {"unreadable": True}
    shared.kubelet.plan(**fault, rank=1)
    began = time.monotonic()
    await shared.create()
    await seen(shared, row, since=began)
    shared.kubelet.plan()
    await shared.until_ready()


@fault(
    Fault(
        id="task-rejected",
        what="a runner that rejects a task which it should accept",
        injected="rank 1's supervisor rejects LoadModel, again and again",
        layer=Layer.OPERATOR,
        state=S.CONNECTED,
        reason=Reason.TASK_REJECTED,
        says="rank 1/2 pod tiny-1 on node n2: LoadModel rejected: a fault of this test: state=RunnerConnected …; "
        "restart 2/5 at …",
        within=15.0,
        then="by itself: the next epoch, in the same pods",
    )
)
async def test_a_rejected_task_is_told_in_the_runners_words(shared: World, row: Fault) -> None:
    shared.kubelet.plan(reject="LoadModel", rank=1)
    began = time.monotonic()
    await shared.create(restartPolicy={"backoff": {"initial": "1h", "max": "1h"}})
    await failed_before(shared)
    await in_state(shared, row, S.CONNECTED)
    await seen(shared, row, since=began)
    await comes_back(shared)


@fault(
    Fault(
        id="engine-unsupported-model",
        what="an architecture that cannot be split this way",
        injected="rank 1's engine refuses the model while it loads",
        layer=Layer.OPERATOR,
        state=S.LOADING,
        reason=Reason.MODEL_UNSUPPORTED,
        says="rank 1/2 pod tiny-1 on node n2: num_key_value_heads 1 is not divisible by 2 ranks: use another number of "
        "runners, or Pipeline, in RunnerLoading; no restart: trying again cannot help; …",
        sharding=Sharding.TENSOR,
        within=3.0,
    ),
    Fault(
        id="insufficient-memory",
        what="a shard that does not fit",
        injected="rank 1's engine refuses the model while it loads",
        layer=Layer.OPERATOR,
        state=S.LOADING,
        reason=Reason.INSUFFICIENT_MEMORY,
        says="rank 1/2 pod tiny-1 on node n2: needs 2.4Gi = weights 1.9Gi + KV 64Mi (8 x 2048 tokens) + 446Mi (process "
        "310Mi, copies and prefill 136Mi); limit 2Gi: even one short request does not fit, in RunnerLoading; "
        "no restart: trying again cannot help; …",
        within=3.0,
    ),
)
async def test_a_model_that_the_engine_refuses_is_told_and_not_tried_again(shared: World, row: Fault) -> None:
    await started(shared, row, hold="Load")
    await in_state(shared, row, S.LOADING)
    _, _, said = row.says.partition(": ")
    words = said.partition(", in RunnerLoading")[0]
    began = time.monotonic()
    shared.kubelet.plan(fail={"on": "Load", "reason": row.reason, "message": words}, rank=1)
    await seen(shared, row, since=began)
    await stays_until_asked(shared)
