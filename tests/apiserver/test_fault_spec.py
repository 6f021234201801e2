"""A spec that an older CRD admitted, as the operator tells it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from mlx_operator.act.kube import KubeError
from mlx_operator.act.resources import INSTANCES
from mlx_operator_api import crd, names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.schema import VALIDATIONS
from tests.apiserver.faulting import seen
from tests.apiserver.harness import World, eventually, kubectl
from tests.cluster.deploy import ROOT
from tests.faults import Fault, Layer, fault

pytestmark = pytest.mark.asyncio(loop_scope="module")
NAME = f"{names.PLURAL}.{names.GROUP}"
FIELD = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/deadlines/properties/load"


@pytest_asyncio.fixture(loop_scope="module")
async def lenient(shared: World) -> AsyncIterator[World]:
    """The CRD without the rules of a field."""
    patch = [{"op": "remove", "path": f"{FIELD}/{VALIDATIONS}"}]
    await asyncio.to_thread(kubectl, shared.server, "patch", "crd", NAME, "--type=json", "-p", json.dumps(patch))
    try:
        yield shared
    finally:
        files = str(ROOT / crd.DIRECTORIES[0] / crd.FILE)
        await asyncio.to_thread(kubectl, shared.server, "replace", "-f", files)


@fault(
    Fault(
        id="spec-of-an-older-crd",
        what="a spec that an older CRD admitted",
        injected="`spec.deadlines.load: 10 minutes`, created while the CRD had no rule for it",
        layer=Layer.OPERATOR,
        state=None,
        reason=Reason.INVALID_SPEC,
        condition=ConditionType.READY,
        says="spec.deadlines.load: …10 minutes…; correct the field that the message names",
        rank=None,
        ranks=1,
        within=3.0,
        then="the user: a change of the spec",
    )
)
async def test_a_spec_that_cannot_be_used_is_told_by_its_field_and_value(lenient: World, row: Fault) -> None:
    async def taken() -> bool:
        try:
            await lenient.create(runners=1, deadlines={"load": "10 minutes"})
        except KubeError as error:
            if error.status != 422:
                raise
            return False
        return True

    await eventually(taken, "the API server knows the CRD without the rule")
    await seen(lenient, row, since=time.monotonic())
    body = {"spec": {"deadlines": {"load": "10m"}}}
    await lenient.kube.merge_patch(INSTANCES, lenient.namespace, "tiny", body)
    await lenient.until_ready()
