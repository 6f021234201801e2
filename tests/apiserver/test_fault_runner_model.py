"""Models that are missing, refused, broken or too large, found by real downloads, as the operator tells it."""

import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_operator.act.resources import INSTANCES
from mlx_operator_api.conditions import ConditionType, Reason
from tests.apiserver.faulting import seen, stays_until_asked
from tests.apiserver.harness import World
from tests.apiserver.kubelet import write_model
from tests.faults import Fault, Layer, fault
from tests.hub import Fault as HubFault
from tests.hub import Hub, Kind, serving
from tests.runner.downloads import NAME, hub_of, write_repository

pytestmark = pytest.mark.asyncio(loop_scope="module")
ASKED = "by itself every 5 minutes, at once by the annotation `mlx-operator.dev/retry`"
CLAIM = Fault(
    id="claim-without-model",
    what="no model at that place of the claim",
    injected="`pvc://models/tiny` leads to a directory that is not there",
    layer=Layer.OPERATOR,
    state=None,
    reason=Reason.MODEL_NOT_FOUND,
    condition=ConditionType.MODEL_AVAILABLE,
    says="rank 0/1 pod tiny-0 on node n1: DownloadModel failed: …; tried again every 5 minutes; …",
    rank=0,
    ranks=1,
    within=8.0,
    then=ASKED,
)


@fault(
    CLAIM,
    replace(
        CLAIM,
        id="claim-with-truncated-file",
        what="a truncated file of the model",
        injected="`model.safetensors` is cut short",
        reason=Reason.MODEL_CORRUPT,
        says=CLAIM.says.replace("tried again every 5 minutes", "not tried again by itself"),
        then="the user: nothing is tried again before that",
    ),
    replace(
        CLAIM,
        id="source-unsupported",
        what="a kind of source that the runner image does not know",
        injected="the supervisors are given `s3://models/tiny`, as by a newer operator",
        reason=Reason.SOURCE_UNSUPPORTED,
        says=CLAIM.says.replace("tried again every 5 minutes", "not tried again by itself"),
        then="the user: nothing is tried again before that",
    ),
)
async def test_a_claim_that_cannot_be_used_is_told(shared: World, row: Fault) -> None:
    model = shared.kubelet.folder / "models" / "tiny"
    match row.reason:
        case Reason.MODEL_NOT_FOUND:
            shutil.rmtree(model)
        case Reason.MODEL_CORRUPT:
            (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-2])
        case _:
            shared.kubelet.plan(source="s3://models/tiny")
    began = time.monotonic()
    try:
        await shared.create(runners=row.ranks)
        await seen(shared, row, since=began)
    finally:
        write_model(model)
    await stays_until_asked(shared)


HOUR = 3610.0
"""Of `deadlines.download`, for which the test has a few seconds."""
CHANGED = {"hub-wrong-name", "hub-wrong-revision", "cache-too-small"}
"""What another spec heals."""
HUB = replace(CLAIM, id="", what="", injected="", within=10.0)


@fault(
    replace(
        HUB,
        id="hub-wrong-name",
        what="a model name that the hub does not know",
        injected="`hf://org/tinny`, with a token",
        reason=Reason.MODEL_NOT_FOUND,
        then="the user: a change of the spec",
    ),
    replace(
        HUB,
        id="hub-wrong-revision",
        what="a revision that the repository does not have",
        injected="`hf://org/tiny@v2`",
        reason=Reason.MODEL_NOT_FOUND,
        then="the user: a change of the spec",
    ),
    replace(
        HUB,
        id="hub-no-token",
        what="a private repository, and no token",
        injected="a repository of the hub that asks for a token",
        reason=Reason.MODEL_UNAUTHORIZED,
    ),
    replace(
        HUB,
        id="hub-down",
        what="a hub that does not answer",
        injected="the hub answers 503 until deadlines.download",
        reason=Reason.MODEL_UNREACHABLE,
        within=HOUR,
    ),
    replace(
        HUB,
        id="hub-slow",
        what="a download that takes too long",
        injected="a hub that sends a few bytes a second, until deadlines.download",
        reason=Reason.DOWNLOAD_TIMEOUT,
        within=HOUR,
    ),
    replace(
        HUB,
        id="cache-too-small",
        what="a cache that is too small",
        injected="`spec.cache.sizeLimit: 10Ki`",
        reason=Reason.NO_SPACE,
        then="the user: a change of the spec",
    ),
    replace(
        HUB,
        id="hub-corrupt-file",
        what="a file that is not what the hub's list says",
        injected="the hub sends one byte of a file wrong, again and again",
        reason=Reason.MODEL_CORRUPT,
        says=CLAIM.says.replace("tried again every 5 minutes", "not tried again by itself"),
        then="the user: nothing is tried again before that",
    ),
)
async def test_a_hubs_model_that_cannot_be_had_is_told(shared: World, row: Fault, tmp_path: Path) -> None:
    async with hub(tmp_path) as served:
        slow = row.id == "hub-slow"
        deadlines = {"download": "10s" if slow else "2s"} if row.within == HOUR else {}
        began = time.monotonic()
        await shared.create(**of(served, row), runners=row.ranks, deadlines=deadlines)
        if slow:
            await shared.until(lambda i: "revision" in i.get("status", {}).get("model", {}), "the commit is known")
        await seen(shared, row, since=began)
        served.faults.clear()
        served.bytes_per_second = None
        served.repositories[NAME].token = None
        if row.id in CHANGED or row.within == HOUR:
            body = {"spec": {"model": {"source": f"hf://{NAME}"}, "cache": None, "deadlines": None}}
            await shared.kube.merge_patch(INSTANCES, shared.namespace, "tiny", body)
            await shared.until_ready()
        else:
            await stays_until_asked(shared)


def of(served: Hub, row: Fault) -> dict[str, Any]:
    """Let a fault be there; the spec of the instance that meets it."""
    source, more, environment = f"hf://{NAME}", {}, {"HF_ENDPOINT": served.url}
    match row.id:
        case "hub-wrong-name":
            source = "hf://org/tinny"
            environment["HF_TOKEN"] = "t"
        case "hub-wrong-revision":
            source = f"hf://{NAME}@v2"
        case "hub-no-token":
            served.repositories[NAME].token = "secret"
        case "hub-down":
            served.faults.append(HubFault(kind=Kind.STATUS, status=503))
        case "hub-slow":
            served.bytes_per_second = 100
        case "cache-too-small":
            more = {"cache": {"sizeLimit": "10Ki"}}
        case _:
            served.faults.append(HubFault(kind=Kind.CORRUPT, path="embed"))
    runner = {"env": [{"name": name, "value": value} for name, value in environment.items()]}
    return {"model": {"source": source}, "runner": runner, **more}


@contextlib.asynccontextmanager
async def hub(folder: Path) -> AsyncIterator[Hub]:
    found, _ = hub_of(write_repository(folder / "repository"))
    async with serving(found):
        yield found
