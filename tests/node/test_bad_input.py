"""What users get wrong ends in a condition that says so, with the words of whoever noticed."""

from collections.abc import Callable
from typing import Any

import pytest

from mlx_operator_api.conditions import ConditionType, Reason
from tests.node.instance import Instance


def assert_reads_well(instance: Instance, reason: Reason, *words: str) -> None:
    """The Ready condition carries reason, words and remedy; `brief` says what to do; the operator lives."""
    ready = instance.condition(ConditionType.READY)
    for word in words:
        assert word in ready["message"], f"{word!r} is missing in: {ready['message']}"
    assert len(ready["message"]) <= 1024
    brief = instance.status()["brief"]
    assert reason in brief[0], brief
    assert any(line.startswith("do: ") for line in brief), brief


def test_an_image_that_cannot_be_pulled_is_told_with_the_registrys_words(create: Callable[..., Instance]) -> None:
    instance = create("nopull", runners=2, runner={"image": "registry.invalid/mlx-runner:none"})
    instance.wait_condition(ConditionType.READY, "False", Reason.IMAGE_PULL_FAILED)
    # Each node asks the registry at its own pace, so either rank may be the first that is told of.
    instance.wait(
        "both ranks' pulls have failed",
        lambda status: any("the same on 2 ranks" in c["message"] for c in status["conditions"] if c["type"] == "Ready"),
    )
    assert_reads_well(instance, Reason.IMAGE_PULL_FAILED, "rank 0/2", "nopull-0", "registry.invalid/mlx-runner:none")


def test_a_selector_that_matches_no_node_is_told_with_the_schedulers_words(create: Callable[..., Instance]) -> None:
    instance = create("nonode", runners=2, runner={"nodeSelector": {"disk": "none"}})
    instance.wait_condition(ConditionType.READY, "False", Reason.UNSCHEDULABLE)
    assert_reads_well(instance, Reason.UNSCHEDULABLE, "rank 0/2", "node affinity/selector")
    instance.kubectl.patch("mi", "nonode", instance.namespace, {"spec": {"runner": {"nodeSelector": None}}})
    instance.wait_ready()


@pytest.mark.parametrize(
    ("name", "break_it", "reason", "word"),
    [
        ("missing", "empty", Reason.MODEL_NOT_FOUND, "config.json"),
        ("corrupt", "truncate", Reason.MODEL_CORRUPT, "model-00001-of-00002.safetensors"),
        ("foreign", "architecture", Reason.MODEL_UNSUPPORTED, "foobar9000"),
    ],
)
def test_a_broken_model_is_told_by_file_and_does_not_crash_loop(
    cluster: Any, create: Callable[..., Instance], name: str, break_it: str, reason: Reason, word: str
) -> None:
    source = cluster.broken_model(break_it)
    instance = create(name, source=source, runners=2)
    instance.wait_condition(ConditionType.STALLED, "True", reason)
    assert_reads_well(instance, reason, word)
    pods = instance.pods()
    assert len(pods) == 2, "pods stay for inspection"
    restarts = [p["status"]["containerStatuses"][0]["restartCount"] for p in pods.values()]
    assert restarts == [0, 0], "a bad model must not crash-loop the container"
    assert instance.status().get("restarts", 0) == 0, "a bad model must not spend the budget"


def test_a_missing_claim_is_named(create: Callable[..., Instance]) -> None:
    instance = create("noclaim", source="pvc://nowhere/model", runners=1)
    instance.wait_condition(ConditionType.READY, "False", Reason.VOLUME_NOT_FOUND)
    assert_reads_well(instance, Reason.VOLUME_NOT_FOUND, "nowhere")
