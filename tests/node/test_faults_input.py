"""What users get wrong ends in a condition that says so, with the words of whoever noticed."""

from collections.abc import Callable
from typing import Any

from mlx_operator_api.conditions import ConditionType, Reason
from tests.faults import Fault, Layer, fault
from tests.node.instance import Instance


def mistake(id: str, what: str, injected: str, reason: Reason, says: str, **more: Any) -> Fault:
    return Fault(
        id=f"node-{id}",
        what=what,
        injected=injected,
        layer=Layer.CLUSTER,
        state=None,
        reason=reason,
        says=says,
        rank=None,
        **more,
    )


def assert_reads_well(instance: Instance, row: Fault) -> None:
    """The Ready condition carries reason, words and remedy; `brief` says what to do; the operator lives."""
    ready = instance.condition(ConditionType.READY)
    assert row.reason is not None and ready["reason"] == row.reason, ready
    row.check(None, row.reason, ready["message"])
    assert len(ready["message"]) <= 1024
    brief = instance.status()["brief"]
    assert ready["reason"] in brief[0], brief
    assert any(line.startswith("do: ") for line in brief), brief


@fault(
    mistake(
        "image-missing",
        "an image that does not exist",
        "`spec.runner.image` names a registry that does not exist",
        Reason.IMAGE_PULL_FAILED,
        "rank 0/2 pod nopull-0 on node …registry.invalid/mlx-runner:none…the same on 2 ranks…",
    )
)
def test_an_image_that_cannot_be_pulled_is_told_with_the_registrys_words(
    create: Callable[..., Instance], row: Fault
) -> None:
    instance = create("nopull", runners=2, runner={"image": "registry.invalid/mlx-runner:none"})
    instance.wait_condition(ConditionType.READY, "False", row.reason)
    # Each node asks the registry at its own pace, so either rank may be the first that is told of.
    instance.wait(
        "both ranks' pulls have failed",
        lambda status: any("the same on 2 ranks" in c["message"] for c in status["conditions"] if c["type"] == "Ready"),
    )
    assert_reads_well(instance, row)


@fault(
    mistake(
        "unschedulable",
        "no node fits",
        "`spec.runner.nodeSelector` asks for a label that no node has",
        Reason.UNSCHEDULABLE,
        "rank 0/2…node affinity/selector…",
    )
)
def test_a_selector_that_matches_no_node_is_told_with_the_schedulers_words(
    create: Callable[..., Instance], row: Fault
) -> None:
    instance = create("nonode", runners=2, runner={"nodeSelector": {"disk": "none"}})
    instance.wait_condition(ConditionType.READY, "False", row.reason)
    assert_reads_well(instance, row)
    instance.kubectl.patch("mi", "nonode", instance.namespace, {"spec": {"runner": {"nodeSelector": None}}})
    instance.wait_ready()


BROKEN = {"node-model-missing": "empty", "node-model-truncated": "truncate", "node-model-unknown": "architecture"}


@fault(
    mistake(
        "model-missing",
        "no model at the source",
        "a claim with an empty directory",
        Reason.MODEL_NOT_FOUND,
        "…config.json…",
    ),
    mistake(
        "model-truncated",
        "a damaged model",
        "a safetensors file is cut short",
        Reason.MODEL_CORRUPT,
        "…model-00001-of-00002.safetensors…",
    ),
    mistake(
        "model-unknown",
        "a model that nobody knows",
        "config.json names the model_type foobar9000",
        Reason.MODEL_UNSUPPORTED,
        "…foobar9000…",
    ),
)
def test_a_broken_model_is_told_by_file_and_does_not_crash_loop(
    cluster: Any, create: Callable[..., Instance], row: Fault
) -> None:
    source = cluster.broken_model(BROKEN[row.id])
    instance = create("broken", source=source, runners=2)
    instance.wait_condition(ConditionType.STALLED, "True", row.reason)
    assert_reads_well(instance, row)
    pods = instance.pods()
    assert len(pods) == 2, "pods stay for inspection"
    restarts = [p["status"]["containerStatuses"][0]["restartCount"] for p in pods.values()]
    assert restarts == [0, 0], "a bad model must not crash-loop the container"
    assert instance.status().get("restarts", 0) == 0, "a bad model must not spend the budget"


@fault(
    mistake(
        "claim-missing",
        "no such claim",
        "`spec.model.source` names a PersistentVolumeClaim that does not exist",
        Reason.VOLUME_NOT_FOUND,
        "…nowhere…",
        ranks=1,
    )
)
def test_a_missing_claim_is_named(create: Callable[..., Instance], row: Fault) -> None:
    instance = create("noclaim", source="pvc://nowhere/model", runners=1)
    instance.wait_condition(ConditionType.READY, "False", row.reason)
    assert_reads_well(instance, row)
