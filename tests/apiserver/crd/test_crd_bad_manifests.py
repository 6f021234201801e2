"""What a user reads when `kubectl apply` refuses a ModelInstance: field, value and remedy, word for word."""

import copy
from typing import Any

import pytest

from tests.apiserver.crd.kubectl import Kubectl

PREFIX = 'The ModelInstance "tiny" is invalid: '
# The API server adds this line when a structural error kept it from running the CEL rules.
UNCHECKED = (
    "\n* <nil>: Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation"
)
DURATION = "is no duration: write a number with a unit (ms, s, m, h), for example 90s or 10m"
QUANTITY = (
    "no quantity: write a number of zero or more, at most 18 digits, with an optional unit, for example 500m, 2 or 4Gi"
)
LABEL = "is no label value: use letters, digits, -, _ and . and start and end with a letter or digit"
NAME = "is no name of a Kubernetes object: use lower-case letters and digits, with - and . between them"
KEY = "use letters, digits, -, _ and ., a letter or digit at its ends, and a domain and / before it if need be"


def manifest(spec: dict[str, Any], name: str = "tiny") -> dict[str, Any]:
    """A ModelInstance with a good source, changed as the test says."""
    good = {"model": {"source": "pvc://models/tiny"}}
    return {
        "apiVersion": "mlx-operator.dev/v1alpha1",
        "kind": "ModelInstance",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {**copy.deepcopy(good), **spec},
    }


def value(path: str, shown: str, words: str) -> str:
    """Kubernetes' form: the path, the value, our words."""
    return f"{path}: Invalid value: {shown}: {words}" if shown else f"{path}: Invalid value: {words}"


def text(path: str, shown: str, words: str) -> str:
    """The same for a string, whose value our words repeat: older API servers print its type in place of it."""
    return value(path, f'"{shown}"', f"{shown} {words}".strip())


def structural(line: str) -> str:
    """A structural error that stands before unchecked rules."""
    return f"\n* {line}{UNCHECKED}"


SOURCE = "spec.model.source"
RUNNER = "spec.runner"
CASES: list[tuple[dict[str, Any], str]] = [
    # -- the model
    (
        {"model": {"source": "s3://bucket/model"}},
        text(
            SOURCE, "s3://bucket/model", "is no model source: use hf://ORG/NAME[@REV], pvc://CLAIM/PATH or oci://IMAGE"
        ),
    ),
    (
        {"model": {"source": "Qwen/Qwen2.5-0.5B"}},
        text(
            SOURCE, "Qwen/Qwen2.5-0.5B", "is no model source: use hf://ORG/NAME[@REV], pvc://CLAIM/PATH or oci://IMAGE"
        ),
    ),
    (
        {"model": {"source": "pvc://m/a", "adapter": {"source": "hf://adapter"}}},
        text(
            "spec.model.adapter.source", "hf://adapter", "names no repository: write hf://ORG/NAME or hf://ORG/NAME@REV"
        ),
    ),
    (
        {"model": {"source": "hf://gpt2"}},
        text(SOURCE, "hf://gpt2", "names no repository: write hf://ORG/NAME or hf://ORG/NAME@REV"),
    ),
    (
        {"model": {"source": "pvc://My_Claim/x"}},
        text(
            SOURCE,
            "pvc://My_Claim/x",
            "names no claim: write pvc://CLAIM or pvc://CLAIM/PATH, with the name of a PersistentVolumeClaim",
        ),
    ),
    (
        {"model": {"source": "pvc://models/../secrets"}},
        text(
            SOURCE,
            "pvc://models/../secrets",
            "leads out of the volume: write the path inside the claim without ..",
        ),
    ),
    (
        {"model": {"source": "oci://"}},
        text(SOURCE, "oci://", "names no image: write oci://REGISTRY/NAME:TAG or oci://REGISTRY/NAME@DIGEST"),
    ),
    ({"model": {}}, structural("spec.model.source: Required value")),
    ({"model": None}, structural("spec.model: Required value")),
    (
        {"model": {"source": "pvc://m", "servedName": "my model"}},
        text(
            "spec.model.servedName",
            "my model",
            "cannot be sent as a model name: start with a letter or digit, then letters, digits and . _ : / @ + -",
        ),
    ),
    (
        {"model": {"source": "hf://a/b", "credentialsSecretRef": {"name": "HF_TOKEN"}}},
        text("spec.model.credentialsSecretRef.name", "HF_TOKEN", NAME),
    ),
    # -- the group
    ({"runners": 0}, value("spec.runners", "0", "spec.runners in body should be greater than or equal to 1")),
    ({"runners": 65}, value("spec.runners", "65", "spec.runners in body should be less than or equal to 64")),
    (
        {"runners": "two"},
        structural('spec.runners: Invalid value: "string": spec.runners in body must be of type integer: "string"'),
    ),
    (
        {"sharding": "pipeline"},
        structural('spec.sharding: Unsupported value: "pipeline": supported values: "Pipeline", "Tensor"'),
    ),
    (
        {"suspend": "yes"},
        structural('spec.suspend: Invalid value: "string": spec.suspend in body must be of type boolean: "string"'),
    ),
    # -- the pods
    (
        {"runner": {"image": "my image"}},
        text(f"{RUNNER}.image", "my image", "is no image: write REGISTRY/NAME:TAG or REGISTRY/NAME@DIGEST"),
    ),
    (
        {"runner": {"resources": {"limits": {"memory": "1GB"}}}},
        value(f"{RUNNER}.resources.limits[memory]", '"1GB"', QUANTITY),
    ),
    (
        {"runner": {"resources": {"requests": {"cpu": -1}}}},
        value(f"{RUNNER}.resources.requests[cpu]", "-1", QUANTITY),
    ),
    (
        {"runner": {"resources": {"limits": {"memmory": "1Gi"}}}},
        value(
            f"{RUNNER}.resources.limits",
            "",
            "memmory: unknown resource: use cpu, memory, ephemeral-storage, hugepages-SIZE or one with a domain such "
            "as nvidia.com/gpu",
        ),
    ),
    # Its own quantity() would keep the API server busy with a billion digits.
    (
        {"runner": {"resources": {"limits": {"memory": "1e999999999"}}}},
        value(f"{RUNNER}.resources.limits[memory]", '"1e999999999"', QUANTITY),
    ),
    (
        {"runner": {"tolerations": [{"key": "a b", "operator": "Exists"}]}},
        text(f"{RUNNER}.tolerations[0].key", "a b", f"is no key of a taint: {KEY}"),
    ),
    (
        {"runner": {"nodeSelector": {"a b": "c"}}},
        value(f"{RUNNER}.nodeSelector", "", f"a b: no key of a label: {KEY}"),
    ),
    (
        {"runner": {"podAnnotations": {"a/b/c": "d"}}},
        value(f"{RUNNER}.podAnnotations", "", f"a/b/c: no key of an annotation: {KEY}"),
    ),
    ({"runner": {"serviceAccountName": "a..b"}}, text(f"{RUNNER}.serviceAccountName", "a..b", NAME)),
    (
        {"runner": {"tolerations": [{"effect": "NoSchedule"}]}},
        value(
            f"{RUNNER}.tolerations[0]",
            "",
            "a toleration without key matches every taint: say so with operator: Exists, or name a key",
        ),
    ),
    (
        {"runner": {"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}},
        value(
            f"{RUNNER}.tolerations[0].value",
            "",
            "operator Exists takes no value: remove value, or use operator: Equal",
        ),
    ),
    (
        {"runner": {"tolerations": [{"key": "a", "tolerationSeconds": 30}]}},
        value(f"{RUNNER}.tolerations[0].tolerationSeconds", "", "tolerationSeconds needs effect: NoExecute"),
    ),
    (
        {"runner": {"tolerations": [{"key": "a", "effect": "NoRun"}]}},
        structural(
            f'{RUNNER}.tolerations[0].effect: Unsupported value: "NoRun": supported values: "NoSchedule", '
            '"PreferNoSchedule", "NoExecute"'
        ),
    ),
    (
        {"runner": {"env": [{"name": "MLX_RUNNER_RANK", "value": "1"}]}},
        text(
            f"{RUNNER}.env[0].name",
            "MLX_RUNNER_RANK",
            "is reserved: the operator sets MLX_RUNNER_* and MLX_INSTANCE_* itself",
        ),
    ),
    (
        {"runner": {"env": [{"name": "MLX_INSTANCE_UID", "value": "1"}]}},
        text(
            f"{RUNNER}.env[0].name",
            "MLX_INSTANCE_UID",
            "is reserved: the operator sets MLX_RUNNER_* and MLX_INSTANCE_* itself",
        ),
    ),
    (
        {"runner": {"env": [{"name": "1A", "value": "1"}]}},
        text(
            f"{RUNNER}.env[0].name",
            "1A",
            "is no name of an environment variable: use letters, digits, _, - and . and no digit first",
        ),
    ),
    (
        {"runner": {"env": [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}},
        value(f"{RUNNER}.env[0]", "", "value and valueFrom exclude each other: remove one"),
    ),
    (
        {"runner": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}},
        f'{RUNNER}.env[1]: Duplicate value: {{"name":"A"}}',
    ),
    (
        {"runner": {"env": [{"name": "A", "value": 1}]}},
        structural(
            f'{RUNNER}.env[0].value: Invalid value: "integer": {RUNNER}.env[0].value in body must be of type string: '
            '"integer"'
        ),
    ),
    (
        {"runner": {"podLabels": {"mlx-operator.dev/rank": "7"}}},
        value(
            f"{RUNNER}.podLabels",
            "",
            "mlx-operator.dev/rank: the operator sets this label itself: remove it, or use a domain of your own",
        ),
    ),
    (
        {"runner": {"podLabels": {"app.kubernetes.io/name": "x"}}},
        value(
            f"{RUNNER}.podLabels",
            "",
            "app.kubernetes.io/name: the operator sets this label itself: remove it, or use a domain of your own",
        ),
    ),
    ({"runner": {"podLabels": {"team": "data science"}}}, text(f"{RUNNER}.podLabels[team]", "data science", LABEL)),
    ({"runner": {"nodeSelector": {"pool": "gpu!"}}}, text(f"{RUNNER}.nodeSelector[pool]", "gpu!", LABEL)),
    (
        {"runner": {"podAnnotations": {"mlx-operator.dev/template-hash": "x"}}},
        value(
            f"{RUNNER}.podAnnotations",
            "",
            "mlx-operator.dev/template-hash: the operator sets this annotation itself: remove it, or use a domain of "
            "your own",
        ),
    ),
    ({"runner": {"priorityClassName": "High"}}, text(f"{RUNNER}.priorityClassName", "High", NAME)),
    (
        {"runner": {"imagePullSecrets": [{"name": "my_secret"}]}},
        text(f"{RUNNER}.imagePullSecrets[0].name", "my_secret", NAME),
    ),
    # -- the rest
    (
        {"cache": {"claimName": "models", "sizeLimit": "1Gi"}},
        value(
            "spec.cache", "", "sizeLimit limits the emptyDir, which claimName replaces: remove claimName or sizeLimit"
        ),
    ),
    ({"cache": {"sizeLimit": "big"}}, value("spec.cache.sizeLimit", '"big"', QUANTITY)),
    ({"deadlines": {"load": "10 minutes"}}, text("spec.deadlines.load", "10 minutes", DURATION)),
    ({"deadlines": {"connect": "1.5m"}}, text("spec.deadlines.connect", "1.5m", DURATION)),
    ({"deadlines": {"pull": "30"}}, text("spec.deadlines.pull", "30", DURATION)),
    (
        {"deadlines": {"progress": "0s"}},
        text("spec.deadlines.progress", "0s", "is no time at all: write a duration above zero, for example 30s"),
    ),
    (
        {"deadlines": {"load": 600}},
        structural(
            'spec.deadlines.load: Invalid value: "integer": spec.deadlines.load in body must be of type string: '
            '"integer"'
        ),
    ),
    (
        {"restartPolicy": {"backoff": {"initial": "10s", "max": "5s"}}},
        value("spec.restartPolicy.backoff", "", "initial 10s is longer than max 5s: lower initial or raise max"),
    ),
    (
        {"restartPolicy": {"backoff": {"initial": "10m"}}},
        value(
            "spec.restartPolicy.backoff",
            "",
            "initial 10m is longer than max 5m (the default): lower initial or raise max",
        ),
    ),
    ({"restartPolicy": {"resetAfter": "never"}}, text("spec.restartPolicy.resetAfter", "never", DURATION)),
    (
        {"restartPolicy": {"maxRestarts": -1}},
        value(
            "spec.restartPolicy.maxRestarts",
            "-1",
            "spec.restartPolicy.maxRestarts in body should be greater than or equal to 0",
        ),
    ),
    (
        {"serving": {"maxConcurrentRequests": 0}},
        value(
            "spec.serving.maxConcurrentRequests",
            "0",
            "spec.serving.maxConcurrentRequests in body should be greater than or equal to 1",
        ),
    ),
    (
        {"serving": {"promptCacheBytes": -1}},
        value(
            "spec.serving.promptCacheBytes",
            "-1",
            "spec.serving.promptCacheBytes in body should be greater than or equal to 0",
        ),
    ),
    (
        {"serving": {"apiKeySecretRef": {"name": "keys", "key": "no/key"}}},
        text(
            "spec.serving.apiKeySecretRef.key",
            "no/key",
            "is no key of a Secret: use letters, digits, -, _ and .",
        ),
    ),
]


@pytest.mark.parametrize(("spec", "expected"), CASES, ids=[words.strip(" \n*").split(": ")[0] for _, words in CASES])
def test_a_bad_field_is_refused_with_the_field_the_value_and_the_remedy(
    kubectl: Kubectl, spec: dict[str, Any], expected: str
) -> None:
    status, output = kubectl.apply(manifest(spec), dry_run=True)
    assert (status, output) == (1, PREFIX + expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a" * 51, "metadata.name must have at most 50 characters: the pods are called NAME-RANK"),
        ("1st", "metadata.name must start with a letter and hold only a-z, 0-9 and -: the Service is called NAME"),
        ("qwen2.5", "metadata.name must start with a letter and hold only a-z, 0-9 and -: the Service is called NAME"),
    ],
)
def test_a_name_that_its_children_cannot_take_is_refused(kubectl: Kubectl, name: str, words: str) -> None:
    status, output = kubectl.apply(manifest({}, name), dry_run=True)
    assert (status, output) == (1, f'The ModelInstance "{name}" is invalid: metadata.name: Invalid value: {words}')


def test_a_misspelt_field_is_refused_by_name(kubectl: Kubectl) -> None:
    status, output = kubectl.apply(manifest({"runers": 2}), dry_run=True)
    assert status == 1
    assert output.endswith('strict decoding error: unknown field "spec.runers"')


def test_several_bad_fields_are_told_at_once(kubectl: Kubectl) -> None:
    _, output = kubectl.apply(
        manifest({"deadlines": {"load": "x", "pull": "0s"}, "cache": {"sizeLimit": "y"}}), dry_run=True
    )
    for field in ("spec.deadlines.load", "spec.deadlines.pull", "spec.cache.sizeLimit"):
        assert f"* {field}: Invalid value" in output


@pytest.mark.parametrize(
    "spec",
    [
        {"runners": None, "sharding": None},
        {"runners": 1, "sharding": "Tensor"},
        {"runners": 64},
        {"model": {"source": "pvc://models"}},
        {"model": {"source": "pvc://models/a..b/c"}},
        {"model": {"source": "hf://Qwen/Qwen2.5-0.5B-Instruct@refs/pr/1"}},
        {"model": {"source": "oci://127.0.0.1:5000/m@sha256:" + "0" * 64, "servedName": "org/name:tag@rev"}},
        {"runner": {"resources": {"limits": {"memory": "4Gi", "cpu": 2, "nvidia.com/gpu": 1, "hugepages-2Mi": "2Mi"}}}},
        {"runner": {"tolerations": [{"operator": "Exists"}]}},
        {"runner": {"podLabels": {"app.kubernetes.io/x": "", "team": "a"}}},
        {"deadlines": {"load": "999999h999999h", "connect": "500ms", "pull": "1h30m"}},
        {"restartPolicy": {"maxRestarts": 0, "backoff": {"max": "1s"}}},
        {"cache": {"sizeLimit": 1000000}, "serving": {"maxQueue": 0}},
        {"cache": {"sizeLimit": "1.5e9"}, "runner": {"podAnnotations": {"Example.COM/a": "b"}}},
    ],
    ids=str,
)
def test_what_is_unusual_but_good_is_accepted(kubectl: Kubectl, spec: dict[str, Any]) -> None:
    assert kubectl.apply(manifest(spec), dry_run=True) == (
        0,
        "modelinstance.mlx-operator.dev/tiny created (server dry run)",
    )
