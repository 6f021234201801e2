"""The checker can fail: each of these bugs is planted, found, and told in steps that a person can follow."""

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from mlx_operator.decide.actions import DeletePod, Plan, SendTask
from mlx_operator.decide.observed import Observed
from mlx_operator.decide.plan import plan
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import TaskName
from mlx_operator_api.tasks import StartWarmup

from . import liveness
from .explore import ViolationError, explore
from .supervisors import Supervisors
from .world import World


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """A supervisor logs each rejected task."""
    caplog.set_level("CRITICAL", "mlx_runner")


def found(world: World) -> ViolationError:
    """The violation, with its trace."""
    with pytest.raises(ViolationError) as caught:
        liveness.check(explore(world))
    print(caught.value)
    assert caught.value.trace
    return caught.value


def test_an_operator_that_acts_before_the_status_is_written_is_found() -> None:
    violation = found(World(acts_first=True))
    assert "has an engine of epoch 1 that the status does not know" in violation.promise
    assert "operator dies after this" in "\n".join(violation.trace)
    assert "CreateRunner of epoch 1 arrives at rank" in violation.trace[-1]


def test_a_planner_that_forgets_the_cause_is_found() -> None:
    def forgetful(observed: Observed, now: datetime) -> Plan:
        made = plan(observed, now)
        return replace(made, status=made.status.model_copy(update={"history": ()}))

    violation = found(World(planner=forgetful))
    assert violation.promise == "epoch 1 ends without a recorded failure"
    assert any(step.startswith("FAULT: ") for step in violation.trace)


def test_a_planner_that_forgets_the_failures_of_before_is_found() -> None:
    """It records each failure, and drops it once the group is Ready again."""

    def forgetful(observed: Observed, now: datetime) -> Plan:
        made = plan(observed, now)
        ready = made.status.condition(ConditionType.READY)
        if ready is None or ready.status != "True":
            return made
        return replace(made, status=made.status.model_copy(update={"history": ()}))

    assert "a recorded failure is lost" in found(World(size=1, planner=forgetful, kinds=["engine"])).promise


def test_a_planner_that_puts_a_consequence_in_the_place_of_the_cause_is_found() -> None:
    def blaming(observed: Observed, now: datetime) -> Plan:
        made = plan(observed, now)
        history, known = made.status.history, (observed.instance["status"].get("history") or [])
        if not history or not known or history[0].reason is not Reason.ENGINE_CRASHED:
            return made
        blamed = history[0].model_copy(update={"reason": Reason.PEER_LOST})
        return replace(made, status=made.status.model_copy(update={"history": (blamed, *history[1:])}))

    assert "is replaced by PeerLost, which says less" in found(World(planner=blaming)).promise


def _with_spec(observed: Observed, **spec: Any) -> Observed:
    instance = {**observed.instance, "spec": {**observed.instance["spec"], **spec}}
    return replace(observed, instance=instance)


def test_a_planner_that_overspends_is_found() -> None:
    def generous(observed: Observed, now: datetime) -> Plan:
        return plan(_with_spec(observed, restartPolicy={"maxRestarts": 9}), now)

    assert found(World(planner=generous, budget=0)).promise == "budget overspent: restarts=1 of 0"


def test_a_planner_that_does_not_count_what_it_spends_is_found() -> None:
    """The model keeps its own account: the number in the status says nothing."""

    def lavish(observed: Observed, now: datetime) -> Plan:
        made = plan(_with_spec(observed, restartPolicy={"maxRestarts": 9}), now)
        return replace(made, status=made.status.model_copy(update={"restarts": 0}))

    violation = found(World(planner=lavish, budget=0))
    assert violation.promise == "budget overspent: 1 restarts were paid for, the budget is 0"


def test_a_supervisor_that_keeps_the_old_engine_is_found() -> None:
    class Keeping(Supervisors):
        def replace(self, engines: tuple[int, ...], epoch: int) -> tuple[int, ...]:
            return (*engines, epoch)

    violation = found(World(supervisors=Keeping))
    assert "has 2 engines, of epochs 1, 2" in violation.promise


def test_a_planner_that_sends_what_the_table_rejects_is_found() -> None:
    def hasty(observed: Observed, now: datetime) -> Plan:
        made = plan(observed, now)
        early = [
            replace(action, request=action.request.model_copy(update={"task": StartWarmup()}))
            for action in made.actions
            if isinstance(action, SendTask) and action.request.task.name is TaskName.LOAD_MODEL
        ]
        return replace(made, actions=(*made.actions, *early))

    violation = found(World(planner=hasty, faults=0))
    assert violation.promise.startswith("StartWarmup is sent to rank")
    assert violation.promise.endswith("which rejects it")


def test_a_planner_that_does_not_ask_to_be_made_again_is_found() -> None:
    def sleepy(observed: Observed, now: datetime) -> Plan:
        return replace(plan(observed, now), requeue_at=None)

    violation = found(World(size=1, faults=2, budget=2, planner=sleepy, kinds=["engine"]))
    assert violation.promise == liveness.RESTS


def test_a_planner_that_never_rests_is_found() -> None:
    """It deletes a pod whenever the group is Ready."""

    def restless(observed: Observed, now: datetime) -> Plan:
        made = plan(observed, now)
        ready = made.status.condition(ConditionType.READY)
        if ready is None or ready.status != "True":
            return made
        going = [DeletePod(p["metadata"]["name"], p["metadata"]["uid"], "restless") for p in observed.pods[:1]]
        return replace(made, actions=(*made.actions, *going))

    violation = found(World(planner=restless, faults=0))
    assert violation.promise == liveness.CIRCLES
    assert liveness.ROUND in violation.trace
