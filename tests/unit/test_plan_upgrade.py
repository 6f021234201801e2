"""An upgrade of the operator restarts no model: the hashes in status stay, and older supervisors are understood."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import create_model

from mlx_operator.decide import spec as specs
from mlx_operator.decide import template
from mlx_operator.decide.spec import parse
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.deadlines import DEFAULT_DEADLINES
from mlx_operator_api.tasks import PROTOCOL, CreateRunner, ServingOptions
from tests.unit.scenes import condition, ready
from tests.unit.simulator import Cluster
from tests.unit.test_plan_problems import placed

TINY: dict[str, Any] = {"model": {"source": "pvc://models/tiny"}}
GOLDEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "minimal": (TINY, "6fcb682262", "default-c770ae2a17"),
    "two runners": ({**TINY, "runners": 2}, "96ca2e881b", "default-c770ae2a17"),
    "everything": (
        {
            "model": {"source": "pvc://models/tiny", "servedName": "small"},
            "runners": 3,
            "sharding": "Tensor",
            "serving": {"maxConcurrentRequests": 4, "maxQueue": 0, "maxTokens": 100, "contextLength": 2048},
            "deadlines": {"connect": "1m", "load": "20m", "schedule": "1m", "shutdown": "1m"},
            "runner": {"image": "runner:2", "nodeSelector": {"gpu": "yes"}},
        },
        "7df5852e7c",
        "chosen-9c6c55267d",
    ),
}


def wanted(spec: dict[str, Any]) -> specs.Wanted:
    metadata = {"name": "tiny", "namespace": "default", "uid": "u", "generation": 1}
    return parse({"metadata": metadata, "spec": spec})


@pytest.mark.parametrize(("spec", "spec_hash", "template_hash"), GOLDEN.values(), ids=GOLDEN)
def test_the_hashes_of_a_spec_are_the_same_in_every_release(
    spec: dict[str, Any], spec_hash: str, template_hash: str
) -> None:
    """A change here restarts every model on an upgrade: never correct these values, correct the hash."""
    found, settings = wanted(spec), Cluster().settings
    assert found.spec_hash == spec_hash
    assert template.template_hash(found, "runner:1", settings) == template_hash


@pytest.mark.parametrize("spec", [row[0] for row in GOLDEN.values()], ids=GOLDEN)
def test_a_field_or_a_default_that_a_later_release_brings_changes_no_hash(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = wanted(spec)
    options = create_model("ServingOptions", __base__=ServingOptions, max_queue=(int, 999), new_limit=(int, 7))
    later = create_model("CreateRunner", __base__=CreateRunner, novelty=(str, "yes"), serving=(options, options()))
    monkeypatch.setattr(specs, "CreateRunner", later)
    monkeypatch.setattr("mlx_operator_api.modelinstance.ServingOptions", options)
    monkeypatch.setitem(DEFAULT_DEADLINES, "load", "3h")
    found = wanted(spec)
    told, told_before = found.runner.model_dump(), before.runner.model_dump()
    assert told["novelty"] == "yes"
    assert told["serving"]["new_limit"] == 7
    assert told["deadlines"] != told_before["deadlines"] or "deadlines" in spec
    assert found.spec_hash == before.spec_hash


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"deadlines": {"load": "60s"}}, {"deadlines": {"load": "1m"}}),
        ({"deadlines": {"schedule": "1m"}}, {"deadlines": {"pull": "2m"}}),
        ({"serving": {}}, {}),
        ({"runners": 1, "sharding": "Tensor"}, {}),
        ({"sharding": "Pipeline", "runners": 2}, {"runners": 2}),
    ],
)
def test_what_means_the_same_to_the_runners_has_the_same_hash(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert wanted({**TINY, **one}).spec_hash == wanted({**TINY, **other}).spec_hash


def test_an_adapter_is_told_to_the_runners_and_another_one_is_a_new_epoch() -> None:
    one, other = (
        wanted({"model": {"source": "pvc://models/tiny", "adapter": {"source": source}}})
        for source in ("pvc://models/a", "pvc://models/b")
    )
    assert (one.runner.adapter, other.runner.adapter) == ("pvc://models/a", "pvc://models/b")
    assert len({one.spec_hash, other.spec_hash, wanted(TINY).spec_hash}) == 3


@pytest.mark.parametrize("spoken", [PROTOCOL, PROTOCOL - 1])
def test_each_supervisor_is_spoken_to_in_the_protocol_that_it_speaks(spoken: int) -> None:
    cluster = placed()
    cluster.tick()
    cluster.supervisor(1).protocol = spoken
    cluster.supervisor(1).publish()
    cluster.run()
    assert cluster.ready()
    said = {(sent.request.rank, sent.request.protocol) for sent in cluster.sent}
    assert said == {(0, PROTOCOL), (1, spoken)}


@pytest.mark.parametrize("spoken", [PROTOCOL + 1, PROTOCOL - 2])
def test_a_supervisor_of_a_protocol_that_we_do_not_speak_gets_no_task_and_is_named(spoken: int) -> None:
    cluster = placed()
    cluster.tick()
    cluster.supervisor(1).protocol = spoken
    cluster.supervisor(1).publish()
    cluster.run()
    assert cluster.sent == []
    stalled = condition(cluster, ConditionType.STALLED)
    assert (stalled.status, stalled.reason) == ("True", Reason.PROTOCOL_MISMATCH)
    assert f"protocol {spoken}, this operator {PROTOCOL}; " in stalled.message, "there is no version 0"


@pytest.mark.parametrize("when", ["while suspended", "with the resumption", "never"])
def test_a_suspended_instance_resumes_with_the_newer_default_image_where_a_restart_was_asked(when: str) -> None:
    cluster = ready(restartPolicy={"maxRestarts": 3})
    cluster.kill_engine(1)
    cluster.run()
    assert cluster.status.restarts == 1
    cluster.change(suspend=True)
    cluster.run()
    cluster.settings = replace(cluster.settings, runner_image="runner:2")
    if when == "while suspended":
        cluster.annotate(names.RESTART_ANNOTATION, "now")
        cluster.run()
    elif when == "with the resumption":
        cluster.annotate(names.RESTART_ANNOTATION, "now")
    cluster.change(suspend=False)
    cluster.run()
    assert cluster.ready()
    assert cluster.status.runner_image == ("runner:1" if when == "never" else "runner:2")
    assert cluster.status.restarts == 0, "resume is an epoch with a fresh budget"


def test_a_runner_that_was_started_by_the_release_before_is_ended_in_its_own_protocol() -> None:
    cluster = ready()
    for rank in (0, 1):
        cluster.supervisor(rank).protocol = PROTOCOL - 1
        cluster.supervisor(rank).publish()
    cluster.change(serving={"maxQueue": 1})
    cluster.run()
    assert cluster.ready()
    assert {sent.request.protocol for sent in cluster.sent} == {PROTOCOL - 1}
