"""Models and adapters that are images: what cannot be pulled or mounted is told by the field that names it."""

from typing import Any

import pytest

from mlx_operator.decide.observed import Refusal
from mlx_operator_api.conditions import ConditionType, Reason
from tests.unit.scenes import condition
from tests.unit.simulator import START, Cluster
from tests.unit.test_plan_problems import placed, waiting

CLAIM, MODEL, ADAPTER = "pvc://models/tiny", "oci://registry.example/tiny:1", "oci://registry.example/tiny:1-adapter"
BESIDE = {"source": CLAIM, "adapter": {"source": ADAPTER}}
BOTH = {"source": MODEL, "adapter": {"source": ADAPTER}}
AT, IN = "spec.model.adapter.source", "spec.model.source"


def told(cluster: Cluster) -> tuple[Reason, str]:
    cluster.reconcile()
    found = condition(cluster, ConditionType.STALLED)
    assert found.status == "True"
    assert cluster.status.brief[-1] == f"do: {found.message.rpartition('; ')[2]}"
    return found.reason, found.message


@pytest.mark.parametrize(
    ("model", "image", "field"),
    [
        ({"source": MODEL}, MODEL, IN),
        (BESIDE, ADAPTER, AT),
        (BOTH, MODEL, IN),
        (BOTH, ADAPTER, AT),
        (BESIDE, "oci://runner:1", "spec.runner.image"),
    ],
)
def test_an_image_that_cannot_be_pulled_is_told_by_the_field_that_names_it(
    model: dict[str, Any], image: str, field: str
) -> None:
    cluster = placed(model=model)
    name = image.removeprefix("oci://")
    waiting(cluster, "ErrImagePull", f'failed to pull and unpack image "{name}": unexpected status 418')
    reason, message = told(cluster)
    assert reason is Reason.IMAGE_PULL_FAILED
    assert message.endswith(f"; correct {field} or imagePullSecrets, or make the registry reachable")


@pytest.mark.parametrize(
    ("model", "fields"),
    [({"source": MODEL}, IN), (BESIDE, AT), (BOTH, f"{IN} and {AT}")],
    ids=["model", "beside", "both"],
)
@pytest.mark.parametrize("who", ["kubelet", "API server"])
def test_that_image_volumes_are_unknown_is_told_of_the_fields_that_need_them(
    model: dict[str, Any], fields: str, who: str
) -> None:
    cluster = placed(model=model) if who == "kubelet" else Cluster(model=model)
    if who == "kubelet":
        waiting(cluster, "CreateContainerError", "image volume is not supported by the container runtime")
    else:
        cluster.refuse = Refusal(422, "spec.volumes[4]: Required value: must specify a volume type", START)
        cluster.reconcile()
    reason, message = told(cluster)
    assert reason is Reason.IMAGE_VOLUME_UNSUPPORTED
    assert message.endswith(f"; upgrade the nodes, or use a pvc:// source in {fields}")


def test_without_an_image_in_the_spec_the_same_words_are_about_something_else() -> None:
    cluster = Cluster()
    cluster.refuse = Refusal(422, "spec.volumes[4]: Required value: must specify a volume type", START)
    cluster.reconcile()
    assert told(cluster)[0] is Reason.POD_REFUSED
