"""The budget of restarts: what is seen of it, its end, and how somebody starts again."""

import time
from collections.abc import Callable

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from tests.apiserver import injection
from tests.apiserver.faulting import LONG, failed_before, seen
from tests.apiserver.harness import Manifest, World, again_in, condition
from tests.faults import Fault, Layer, fault

KILLED = "rank 1/2 pod tiny-1 on node n2: engine killed by signal 9 (SIGKILL) in RunnerReady"
LOG = "read the evidence in the message and the log: kubectl logs tiny-1"


async def spent(place: World) -> None:
    """A group that failed once more than it may."""
    await place.create(restartPolicy={"maxRestarts": 1})
    for epoch in (1, 2):
        await place.until(again_in(epoch), f"Ready in epoch {epoch}")
        place.kubelet.kill_engine("tiny-1")


@fault(
    Fault(
        id="kube-back-off",
        what="engine killed a second time",
        injected="`kill -KILL` of rank 1's engine, the restart before it being counted",
        layer=Layer.OPERATOR,
        state=RunnerState.READY,
        reason=Reason.ENGINE_CRASHED,
        says=f"{KILLED}; restart 2/5 at …Z; {LOG}",
        within=3.0,
    )
)
async def test_the_next_restart_is_told_by_number_and_time(place: World, row: Fault) -> None:
    await place.operator()
    await place.create(restartPolicy=LONG)
    await failed_before(place)
    await place.until_ready()
    began = time.monotonic()
    place.kubelet.kill_engine("tiny-1")
    instance = await seen(place, row, since=began)
    due = instance["status"]["nextRestartAt"][11:]
    assert instance["status"]["restarts"] == 2
    assert f"restart 2/5 at {due}" in instance["status"]["brief"][0]
    assert condition(instance, ConditionType.RECONCILING)["message"] == f"restart 2/5 at {due}"


async def test_a_spent_budget_leaves_everything_in_place_until_the_annotation_asks(place: World) -> None:
    await place.operator()
    await spent(place)
    instance = await place.until(lambda i: injection.stalled(i, Reason.RESTART_BUDGET_EXHAUSTED), "the budget is spent")
    pods = {pod["metadata"]["uid"] for pod in await place.pods()}
    assert len(pods) == 2
    assert [failure["epoch"] for failure in instance["status"]["history"]] == [2, 1]
    assert "nextRestartAt" not in instance["status"]
    retry = {"metadata": {"annotations": {names.RETRY_ANNOTATION: "now"}}}
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", retry)
    after = await place.until(again_in(3), "Ready in epoch 3")
    assert {pod["metadata"]["uid"] for pod in await place.pods()} == pods
    assert after["status"]["restarts"] == 0
    assert after["status"]["history"] == instance["status"]["history"]


async def test_a_changed_spec_starts_again_after_a_spent_budget_and_an_unchanged_one_does_not(place: World) -> None:
    await place.operator()
    await spent(place)
    await place.until(lambda i: injection.stalled(i, Reason.RESTART_BUDGET_EXHAUSTED), "the budget is spent")
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"metadata": {"labels": {"team": "a"}}})
    await place.settled()
    assert injection.stalled(await place.get(), Reason.RESTART_BUDGET_EXHAUSTED), "a label is no change"
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": {"serving": {"maxQueue": 3}}})
    await place.until(again_in(3), "Ready in epoch 3")


async def test_the_evidence_survives_pods_operators_and_epochs(place: World) -> None:
    operator = await place.operator()
    await place.create()
    await place.until_ready()
    place.kubelet.kill_engine("tiny-1")
    before = await place.until(again_in(2), "Ready in epoch 2")
    cause, own = before["status"]["history"][0], before["status"]["runners"][1]["lastFailure"]
    assert (cause["rank"], own["signal"]) == (1, "SIGKILL")

    async def kept(check: Callable[[Manifest], bool], what: str) -> None:
        instance = await place.until(check, what)
        assert instance["status"]["history"][-1] == cause
        assert instance["status"]["runners"][1]["lastFailure"] == own

    await operator.kill()
    await place.operator("--no-leader-elect")
    await place.settled()
    await kept(again_in(2), "Ready under another operator")
    other = {"metadata": {"annotations": {names.RESTART_ANNOTATION: "now"}}}
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", other)
    await kept(again_in(3), "Ready in epoch 3")
    await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", {"spec": {"runner": {"podLabels": {"a": "b"}}}})
    await kept(again_in(4), "Ready in other pods")
