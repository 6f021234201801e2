"""What an older CRD let in stays stored: the planner takes any value of any field, or says which one it cannot use.

Without an API server: these values do not get past the one of today.
"""

import json

import pytest

from mlx_operator.decide.actions import CreatePod
from mlx_operator.decide.plan import plan
from mlx_operator.decide.spec import InvalidSpecError, parse
from mlx_operator_api.conditions import ConditionType, Reason
from tests.mutation.mutations import MUTATIONS, Mutation
from tests.mutation.test_mutations import names_the_field
from tests.unit.simulator import Cluster

each = pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])


def stored(mutation: Mutation) -> Cluster:
    """A ModelInstance with this spec, as the API server would give it back."""
    cluster = Cluster()
    cluster.instance["spec"] = json.loads(json.dumps(mutation.spec))
    return cluster


def complaint(cluster: Cluster) -> str | None:
    """What is wrong with its spec, in the planner's words."""
    try:
        parse(cluster.instance)
    except InvalidSpecError as error:
        return str(error)
    return None


@each
def test_any_stored_value_is_planned_for_or_told_by_its_field(mutation: Mutation) -> None:
    cluster = stored(mutation)
    made, wrong = plan(cluster.observed(), cluster.now), complaint(cluster)
    ready = made.status.condition(ConditionType.READY)
    assert ready is not None
    assert (ready.reason is Reason.INVALID_SPEC) == (wrong is not None)
    if wrong is not None:
        assert names_the_field(ready.message, mutation), ready.message
        assert ready.message == f"{wrong}; {Reason.INVALID_SPEC.remedy}"
        assert made.actions == ()
        return
    created = [action.manifest for action in made.actions if isinstance(action, CreatePod)]
    assert len(created) == (0 if mutation.spec.get("suspend") else int(mutation.spec.get("runners") or 1))
    assert json.loads(json.dumps(created)) == created, "it can be sent"
