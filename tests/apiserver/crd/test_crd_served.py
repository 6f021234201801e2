"""The CRD as a real API server serves it: size, explain, columns, examples, status writes, stored old objects."""

import copy
import json
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from mlx_operator_api import crd, names
from mlx_operator_api.conditions import ConditionType, Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.schema import VALIDATIONS
from mlx_operator_api.status import (
    MAX_HISTORY,
    AdapterStatus,
    Condition,
    GroupFailure,
    LastFailure,
    ModelStatus,
    RunnerStatus,
    Status,
)
from tests.apiserver.crd.kubectl import CRD, Kubectl
from tests.cluster.apiserver import ApiServer
from tests.cluster.deploy import ROOT

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
COLLECTION = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"


def instance(name: str, **spec: Any) -> dict[str, Any]:
    """A small ModelInstance in the namespace `default`."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": {"source": "pvc://models/tiny"}, **spec},
    }


def patch_status(server: ApiServer, name: str, status: dict[str, Any]) -> tuple[int, str]:
    """A strict merge patch, as the operator writes it."""
    path = f"{COLLECTION}/{name}/status?fieldManager={names.FIELD_MANAGER}&fieldValidation=Strict"
    return server.api().request("PATCH", path, {"status": status}, content_type="application/merge-patch+json")


@pytest.fixture
def created(kubectl: Kubectl) -> Iterator[str]:
    """Name of a ModelInstance that exists for one test."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    status, output = kubectl.apply(instance(name, runners=2))
    assert status == 0, output
    yield name
    kubectl.run("delete", "mi", name, "--wait=false")


def test_applying_the_crd_again_changes_nothing(kubectl: Kubectl) -> None:
    output = kubectl.run("apply", "-f", str(ROOT / "crds"))
    assert output == "customresourcedefinition.apiextensions.k8s.io/modelinstances.mlx-operator.dev unchanged"


def test_the_server_found_nothing_to_complain_about(kubectl: Kubectl) -> None:
    found = kubectl.get("crd", CRD)
    conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
    assert conditions["Established"] == conditions["NamesAccepted"] == "True"
    assert "NonStructuralSchema" not in conditions


@pytest.mark.parametrize("noun", ["mi", "modelinstance", "modelinstances", "mlx"])
def test_short_name_and_category_are_known(kubectl: Kubectl, created: str, noun: str) -> None:
    assert created in kubectl.run("get", noun)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_is_accepted(kubectl: Kubectl, file: Any) -> None:
    output = kubectl.run("apply", "--dry-run=server", "-f", str(file))
    assert output.endswith("created (server dry run)")


def test_there_are_examples() -> None:
    assert {file.name for file in EXAMPLES} >= {"minimal.yaml", "two-runners.yaml", "tensor.yaml", "full.yaml"}


def described(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text that `kubectl explain` shows) of every field below a node of the published OpenAPI."""
    for name, child in schema.get("properties", {}).items():
        if path or name in ("spec", "status"):
            yield f"{path}.{name}", child.get("description", "")
            yield from described(child, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from described(schema["items"], path)


def test_explain_has_words_for_every_field(kubectl: Kubectl) -> None:
    document = json.loads(kubectl.run("get", "--raw", f"/openapi/v3/apis/{names.API_VERSION}"))
    (schema,) = [
        item
        for item in document["components"]["schemas"].values()
        if any(kind["kind"] == names.KIND for kind in item.get("x-kubernetes-group-version-kind", ()))
    ]
    texts = dict(described(schema))
    assert len(texts) > 90
    assert [path for path, words in texts.items() if len(words) < 8] == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("mi", "One served model: a Service, and one pod for each rank."),
        ("mi.spec.model.source", "Where the weights come from"),
        ("mi.spec.sharding", "ENUM: Pipeline Tensor"),
        ("mi.spec.runner.tolerations.tolerationSeconds", "absent: for ever"),
        ("mi.spec.restartPolicy.backoff.initial", "Default: 2s"),
        ("mi.status.runners.lastFailure.signal", "SIGKILL"),
        ("mi.status.runners.state", "RunnerWarmingUp"),
    ],
)
def test_kubectl_explain_shows_it(kubectl: Kubectl, path: str, words: str) -> None:
    output = " ".join(kubectl.run("explain", path).split())
    assert words in output
    assert "<no description>" not in output


def test_an_instance_that_no_operator_has_seen_is_finished_for_nobody(kubectl: Kubectl, created: str) -> None:
    """To kstatus an object without conditions is finished, unless its generation was not observed."""
    stored = kubectl.get("mi", created)
    assert stored["status"] == {"observedGeneration": -1}
    assert stored["metadata"]["generation"] == 1


def test_the_columns_show_the_state_at_a_glance(kubectl: Kubectl, server: ApiServer, created: str) -> None:
    ready = Condition(
        type=ConditionType.READY,
        status="False",
        reason=Reason.OUT_OF_MEMORY,
        message="x",
        last_transition_time=NOW,
        observed_generation=1,
    )
    status = Status(
        conditions=(ready,), runners_ready="1/2", restarts=2, epoch=3, endpoint=names.endpoint(created, "default")
    )
    code, answer = patch_status(server, created, dumped(status))
    assert code == 200, answer
    header, row = kubectl.run("get", "mi", created).splitlines()
    assert header.split() == ["NAME", "READY", "REASON", "RUNNERS", "RESTARTS", "MODEL", "AGE"]
    assert row.split()[:6] == [created, "False", "OutOfMemory", "1/2", "2", "pvc://models/tiny"]
    header, row = kubectl.run("get", "mi", created, "-o", "wide").splitlines()
    assert header.split()[7:] == ["EPOCH", "SHARDING", "ENDPOINT"]
    assert row.split()[7:] == ["3", f"http://{created}.default.svc:8080/v1"]


def dumped(status: Status) -> dict[str, Any]:
    """A status as the operator sends it."""
    value: dict[str, Any] = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    return value


def maximal() -> Status:
    """The largest status that the operator can write: 64 ranks that all failed, with every field set."""
    failure = LastFailure(
        epoch=7,
        time=NOW,
        state=RunnerState.LOADING,
        reason=Reason.OUT_OF_MEMORY,
        message="m" * 1024,
        exit_code=137,
        signal="SIGKILL",
        diagnostics=("d" * 1024,) * 8,
    )
    group = GroupFailure(
        epoch=7,
        time=NOW,
        reason=Reason.RESTART_BUDGET_EXHAUSTED,
        rank=63,
        message="m" * 1024,
        consequences=tuple(range(63)),
    )
    return Status(
        brief=("b" * 1024,) * (names.MAX_RUNNERS + 8),
        observed_generation=2**40,
        epoch=7,
        ready_runners=64,
        runners_ready="64/64",
        restarts=5,
        next_restart_at=NOW,
        endpoint="http://x.default.svc:8080/v1",
        model=ModelStatus(
            source="s", revision="r", digest="d", bytes=2**40, adapter=AdapterStatus(source="s", revision="r")
        ),
        runner_image="i",
        template_hash="t",
        spec_hash="s",
        observed_retry="a",
        observed_restart="b",
        history=(group,) * MAX_HISTORY,
        runners=tuple(
            RunnerStatus(
                rank=rank,
                pod=f"x-{rank}",
                pod_uid="u" * 36,
                node="n" * 63,
                state=list(RunnerState)[rank % len(RunnerState)],
                since=NOW,
                epoch=7,
                incarnation="i" * 40,
                layers="0-11",
                progress="6/12 layers",
                note="n" * 1024,
                memory_limit_bytes=2**40,
                last_failure=failure,
            )
            for rank in range(names.MAX_RUNNERS)
        ),
        conditions=tuple(
            Condition(
                type=kind,
                status="Unknown",
                reason=Reason.UNKNOWN,
                message="m" * 1024,
                last_transition_time=NOW,
                observed_generation=2**40,
            )
            for kind in ConditionType
        ),
    )


def unset(value: Any, path: str = "status") -> Iterator[str]:
    """Fields of a status that are None or empty."""
    for name in type(value).model_fields:
        child = getattr(value, name)
        if child is None or child == ():
            yield f"{path}.{name}"
        for item in child if isinstance(child, tuple) else (child,):
            if hasattr(type(item), "model_fields"):
                yield from unset(item, f"{path}.{name}")


def test_a_status_with_everything_in_it_is_accepted_and_kept_word_for_word(
    kubectl: Kubectl, server: ApiServer, created: str
) -> None:
    status = maximal()
    assert list(unset(status)) == [], "the largest status leaves a field out"
    code, answer = patch_status(server, created, dumped(status))
    assert code == 200, answer[:500]
    stored = kubectl.get("mi", created)["status"]
    assert stored == dumped(status)
    assert Status.model_validate(stored) == status


@pytest.mark.parametrize("reason", [Reason.PROTOCOL_MISMATCH, Reason.EPOCH_STARTED])
def test_a_condition_of_any_reason_is_accepted(server: ApiServer, created: str, reason: Reason) -> None:
    condition = Condition(
        type=ConditionType.READY,
        status="True",
        reason=reason,
        message="",
        last_transition_time=NOW,
        observed_generation=1,
    )
    assert patch_status(server, created, dumped(Status(conditions=(condition,))))[0] == 200


def test_an_unknown_field_of_status_is_refused_when_strict(server: ApiServer, created: str) -> None:
    code, answer = patch_status(server, created, {"tokensPerSecond": 3})
    assert code == 422
    assert 'unknown field \\"status.tokensPerSecond\\"' in answer


def test_spec_cannot_be_changed_through_status(kubectl: Kubectl, server: ApiServer, created: str) -> None:
    path = f"{COLLECTION}/{created}/status"
    body = {"spec": {"runners": 9}}
    assert server.api().request("PATCH", path, body, content_type="application/merge-patch+json")[0] == 200
    found = kubectl.get("mi", created)
    assert (found["spec"]["runners"], found["metadata"]["generation"]) == (2, 1)


# -- objects that an older CRD, without any rule, let in

STALE: dict[str, Any] = {
    "model": {"source": "s3://old/one", "servedName": "my model"},
    "deadlines": {"load": "ten"},
    "cache": {"claimName": "a", "sizeLimit": "1Gi"},
    "restartPolicy": {"backoff": {"initial": "1h"}},
    "runner": {
        "resources": {"limits": {"memmory": "1GB"}},
        "podLabels": {"mlx-operator.dev/rank": "1"},
        "env": [{"name": "MLX_RUNNER_RANK"}],
        "tolerations": [{"effect": "NoSchedule"}],
    },
}


def without_rules(node: Any) -> Any:
    """A copy of a schema without CEL rules."""
    if isinstance(node, dict):
        return {key: without_rules(value) for key, value in node.items() if key != VALIDATIONS}
    return [without_rules(item) for item in node] if isinstance(node, list) else node


def applied(kubectl: Kubectl, definition: dict[str, Any], *, refuses: bool) -> None:
    """Apply a CRD and wait until the server judges by it (it takes a moment to load a new schema)."""
    kubectl.run("apply", "-f", "-", stdin=yaml.safe_dump(definition))
    deadline = time.monotonic() + 30
    while kubectl.apply(instance("probe", **STALE), dry_run=True)[0] != (1 if refuses else 0):
        assert time.monotonic() < deadline, "the API server did not load the CRD in 30 s"


@pytest.fixture
def stale(kubectl: Kubectl) -> Iterator[str]:
    """Name of a stored ModelInstance that breaks many rules of the present CRD."""
    applied(kubectl, without_rules(copy.deepcopy(crd.definition())), refuses=False)
    status, output = kubectl.apply(instance("stale", **STALE))
    assert status == 0, output
    applied(kubectl, crd.definition(), refuses=True)
    yield "stale"
    kubectl.run("delete", "mi", "stale", "--wait=false")


def test_an_object_from_before_a_rule_can_still_be_written_elsewhere(
    kubectl: Kubectl, server: ApiServer, stale: str
) -> None:
    code, answer = patch_status(server, stale, dumped(Status(epoch=1)))
    assert code == 200, answer
    kubectl.run("label", "mi", stale, "team=a")
    kubectl.run("annotate", "mi", stale, f"{names.RETRY_ANNOTATION}=1")
    for sibling in (
        {"suspend": True},
        {"deadlines": {"pull": "5m"}},
        {"model": {"credentialsSecretRef": {"name": "s"}}},
        {"runner": {"image": "i"}},
        {"restartPolicy": {"maxRestarts": 1}},
    ):
        kubectl.run("patch", "mi", stale, "--type=merge", "-p", json.dumps({"spec": sibling}))
    status, output = kubectl.attempt(
        "patch", "mi", stale, "--type=merge", "-p", json.dumps({"spec": {"deadlines": {"load": "eleven"}}})
    )
    assert status == 1 and "eleven is no duration" in output
