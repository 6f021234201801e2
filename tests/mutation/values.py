"""What a schema cannot know: a good spec that sets every field, and for each field values that mean something.

All else (limits, types, enums, removal) follows from the schema.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

PRIORITY, RUNTIME, ACCOUNT = "inference", "sandbox", "inference"
"""Objects that the cluster of these tests has."""

GOOD: dict[str, Any] = {
    "model": {
        "source": "pvc://models/tiny",
        "credentialsSecretRef": {"name": "hf-token"},
        "adapter": {"source": "pvc://models/adapter"},
        "servedName": "tiny",
    },
    "runners": 1,
    "sharding": "Pipeline",
    "runner": {
        "image": "registry.example/runner:1",
        "resources": {"limits": {"memory": "1Gi"}, "requests": {"memory": "512Mi"}},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [
            {"key": "dedicated", "operator": "Equal", "value": "mlx", "effect": "NoExecute", "tolerationSeconds": 60}
        ],
        "affinity": {
            "podAntiAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname"}}
                ]
            }
        },
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "priorityClassName": PRIORITY,
        "runtimeClassName": RUNTIME,
        "env": [
            {"name": "OMP_NUM_THREADS", "value": "2"},
            {"name": "TEAM", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "imagePullSecrets": [{"name": "registry"}],
        "serviceAccountName": ACCOUNT,
        "podLabels": {"team": "search"},
        "podAnnotations": {"example.com/owner": "search"},
    },
    "cache": {"sizeLimit": "1Gi"},
    "serving": {
        "maxConcurrentRequests": 8,
        "maxQueue": 32,
        "maxTokens": 1024,
        "contextLength": 8192,
        "promptCacheBytes": 1048576,
        "apiKeySecretRef": {"name": "keys", "key": "api-key"},
    },
    "deadlines": {
        "schedule": "9m",
        "pull": "9m",
        "unreachable": "14s",
        "download": "59m",
        "connect": "39s",
        "load": "9m",
        "warmup": "4m",
        "progress": "119s",
        "shutdown": "29s",
        "resume": "59s",
    },
    "restartPolicy": {"maxRestarts": 4, "backoff": {"initial": "3s", "max": "4m"}, "resetAfter": "9m"},
    "suspend": False,
}
"""Sets everything that can be set together, nothing to its default."""


@dataclass(frozen=True)
class Row:
    """Values of a field, besides those that its schema gives."""

    valid: tuple[Any, ...] = ()
    bad: tuple[Any, ...] = ()
    """Must be refused, or end in a condition that names the field."""
    letters: Callable[[int], str] = "a".__mul__
    """A string of any length that is good; entries of a list and keys of a map, too, by their number."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """What the good spec has to say instead, so that the field has an effect."""

    def good(self) -> dict[str, Any]:
        """The spec that is mutated."""
        return {**copy.deepcopy(GOOD), **copy.deepcopy(dict(self.base))}


_EDGES = ("1E", "9" * 18 + "Ei", "1e18", "1E-18", ".5", "5.", "1e3", "+1Gi", "0", 0, 2**63 - 1)
"""Quantities at the edge of what is one."""
_NOT_QUANTITIES = (
    "1e999999999",
    "1e-999999999",
    "1GB",
    "big",
    "-1",
    -1,
    "",
    "1 Gi",
    "é",
    "0x10",
    "1e",
    "NaN",
    "Infinity",
)
_NOT_NAMES = ("Upper", "under_score", "-a", "a-", "a b", "a..b", "a.-b", "a/b", "")
_NOT_LABELS = ("a b", "-a", "a-", "a/b", "é")
_NOT_KEYS = ("a b", "-a", "a-", "a/b/c", "/a", "a/", "", "é", "a" * 64, "UPPER.example/a")
_DURATION = Row(
    valid=("90s", "1h30m", "1ms", "500ms", "999999h999999h", "0h1s", "007s"),
    bad=("10 minutes", "1.5m", "-1s", "30", "0s", "0h0m0s", "", "1d", "\uff11s", "1s ", "s"),
    letters=lambda length: "9" * (length - 1) + "s" if length <= 7 else "1s" * (length // 2) + "s" * (length % 2),
)
_BRIEF_DURATION = replace(_DURATION, valid=("1h30m", "1ms", "999999h999999h"), bad=("1.5m", "-1s", "30", "0s", ""))
_STEP = replace(_BRIEF_DURATION, valid=("1h30m", "30s500ms", "999999h999999h"))
_NAME = Row(valid=("other", "a.b", "0"), bad=_NOT_NAMES)
_SOURCES = (
    "hf://org/tiny", "hf://org/tiny@refs/pr/1", "hf://org/tiny@" + "a" * 40, "pvc://models", "pvc://models/a..b/é c",
    "oci://registry.example:5000/m@sha256:" + "0" * 64, "oci://m",
)  # fmt: skip
_NOT_SOURCES = (
    "s3://bucket/model", "org/tiny", "hf://gpt2", "hf://a/b/c", "hf://org/tiny@", "pvc://My_Claim/x", "pvc://",
    "pvc://models/../secrets", "pvc://models/..", "oci://", "oci://a b", "", "hf://", "HF://a/b", "pvc://a..b/c",
)  # fmt: skip
_AFFINITY_TERM = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]}
_BAD_TERM = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Maybe"}]}]}
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_TWO = {"runners": 2}
_DEVICE = "example.com/device-{}".format
_DEVICES = {
    "runner": {
        **GOOD["runner"],
        "resources": {"limits": {_DEVICE(number): "512Mi" for number in range(16)}, "requests": {"memory": "512Mi"}},
    }
}
_HUB = {"model": {**GOOD["model"], "source": "hf://org/tiny@main"}}

TABLE: dict[str, Row] = {
    "spec.model.source": Row(valid=_SOURCES, bad=_NOT_SOURCES, letters=lambda length: "pvc://m/".ljust(length, "a")),
    "spec.model.credentialsSecretRef": Row(base=_HUB),
    "spec.model.credentialsSecretRef.name": Row(valid=_NAME.valid, bad=_NAME.bad, base=_HUB),
    "spec.model.adapter.source": Row(
        valid=("pvc://models", "oci://registry.example/adapter:1", "hf://org/adapter@main"),
        bad=_NOT_SOURCES,
        letters=lambda length: "pvc://m/".ljust(length, "a"),
    ),
    "spec.model.servedName": Row(valid=("org/name:tag@rev+x", "0"), bad=("my model", "-a", "é", "")),
    "spec.runners": Row(valid=(2, 3)),
    "spec.sharding": Row(base=_TWO),
    "spec.runner.image": Row(
        valid=("localhost:5000/a/b:1", "a@sha256:" + "0" * 64), bad=("my image", "-a", "é", "", " a", "a\n")
    ),
    "spec.runner.resources": Row(
        valid=({"limits": {"cpu": 2, "nvidia.com/gpu": 1}, "requests": {"cpu": "1500m"}},),
        bad=(
            {"limits": {"memory": "1Gi"}, "requests": {"memory": "2Gi"}},
            {"requests": {"nvidia.com/gpu": 1}},
            {"limits": {"nvidia.com/gpu": "500m"}},
        ),
    ),
    "spec.runner.resources.limits": Row(
        valid=({"memory": "1Gi", "cpu": 2, "ephemeral-storage": "1Gi", "hugepages-2Mi": "2Mi", "a.example/gpu": 1},),
        bad=(
            {"memory": "1Gi", "memmory": "1Gi"},
            {"memory": "1Gi", "a/b/c": 1},
            {"memory": "1Gi", "requests.cpu/a": "x"},
        ),
        letters=_DEVICE,
    ),
    "spec.runner.resources.limits{}": Row(valid=("600M", 2**40, *_EDGES), bad=_NOT_QUANTITIES),
    "spec.runner.resources.requests": Row(
        valid=({"memory": "1Gi", "cpu": "0.1"},),
        bad=({"memmory": "1Gi"}, {"memory": "1Gi", "cpu": "1e400"}),
        letters=_DEVICE,
        base=_DEVICES,
    ),
    "spec.runner.resources.requests{}": Row(valid=("500M", 2**20, *_EDGES), bad=_NOT_QUANTITIES),
    "spec.runner.nodeSelector": Row(
        valid=({"a.example/pool": ""},),
        bad=tuple({key: "a"} for key in _NOT_KEYS),
        letters=lambda number: f"a-{number}",
    ),
    "spec.runner.nodeSelector{}": Row(valid=("", "A.b_c-9"), bad=_NOT_LABELS),
    "spec.runner.tolerations": Row(valid=([{"operator": "Exists"}], [{"key": "a"}])),
    "spec.runner.tolerations[]": Row(
        valid=({"operator": "Exists", "effect": "NoExecute"},),
        bad=(
            {"effect": "NoSchedule"},
            {"key": "a", "operator": "Exists", "value": "x"},
            {"key": "a", "tolerationSeconds": 30},
            {"key": "a", "effect": "NoSchedule", "tolerationSeconds": 30},
            {"operator": "Equal"},
        ),
    ),
    "spec.runner.tolerations[].key": Row(
        valid=("node.kubernetes.io/unreachable", "a.example/b"), bad=_NOT_KEYS, letters=lambda length: "a" * length
    ),
    "spec.runner.tolerations[].operator": Row(bad=("Exists",)),
    "spec.runner.tolerations[].value": Row(valid=("", "A.b_c-9"), bad=_NOT_LABELS),
    "spec.runner.tolerations[].tolerationSeconds": Row(valid=(0, -1, 30)),
    "spec.runner.affinity": Row(
        valid=({"nodeAffinity": {_REQUIRED: _AFFINITY_TERM}},),
        bad=(
            {"nodeAffinity": {_REQUIRED: _BAD_TERM}},
            {"nodeAffinity": "gpu"},
            {"nodeAfinity": {_REQUIRED: _AFFINITY_TERM}},
            {"podAffinity": {_REQUIRED: [{}]}},
        ),
    ),
    "spec.runner.topologySpreadConstraints": Row(),
    "spec.runner.topologySpreadConstraints[]": Row(
        valid=({"maxSkew": 2, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"},),
        bad=(
            {},
            {"maxSkew": 0, "topologyKey": "a", "whenUnsatisfiable": "ScheduleAnyway"},
            {"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "Never"},
            {"maxSkew": "one", "topologyKey": "a", "whenUnsatisfiable": "ScheduleAnyway"},
            {"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "ScheduleAnyway", "maxSkeww": 2},
        ),
    ),
    "spec.runner.priorityClassName": Row(bad=("missing", *_NOT_NAMES)),
    "spec.runner.runtimeClassName": Row(bad=("missing", *_NOT_NAMES)),
    "spec.runner.serviceAccountName": Row(bad=("missing", *_NOT_NAMES)),
    "spec.runner.env": Row(
        valid=([{"name": "A"}], [{"name": "HF_TOKEN", "value": "x"}]),
        bad=([{"name": "A", "value": "1"}, {"name": "A", "value": "2"}],),
    ),
    "spec.runner.env[]": Row(
        valid=({"name": "A", "value": "$(TEAM)"},),
        bad=({"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},),
    ),
    "spec.runner.env[].name": Row(
        valid=("a.b-c_D", "HF_TOKEN"),
        bad=("1A", "A=B", "A B", "é", "", "MLX_RUNNER_RANK", "MLX_INSTANCE_UID"),
    ),
    "spec.runner.env[].valueFrom": Row(
        valid=(
            {"secretKeyRef": {"name": "team", "key": "key", "optional": True}},
            {"resourceFieldRef": {"resource": "limits.memory"}},
        ),
        bad=(
            {},
            {"fieldRef": {"fieldPath": "metadata.nonsense"}},
            {"secretKeyRef": {"name": "team"}},
            {"secretKeyReff": {"name": "team", "key": "key"}},
            {"fieldRef": "metadata.name"},
        ),
    ),
    "spec.runner.imagePullSecrets": Row(bad=([{"name": "a"}, {"name": "a"}],)),
    "spec.runner.imagePullSecrets[].name": _NAME,
    "spec.runner.podLabels": Row(
        valid=({"a.example/pool": ""},),
        bad=(
            {"mlx-operator.dev/rank": "7"},
            {"app.kubernetes.io/name": "x"},
            *({key: "a"} for key in _NOT_KEYS),
        ),
        letters=lambda number: f"a-{number}",
    ),
    "spec.runner.podLabels{}": Row(valid=("", "A.b_c-9"), bad=_NOT_LABELS),
    "spec.runner.podAnnotations": Row(
        valid=({"a.example/pool": ""},),
        bad=(
            {"mlx-operator.dev/template-hash": "x"},
            *({key: "a"} for key in _NOT_KEYS if not key.startswith("UPPER")),
        ),
        letters=lambda number: f"a-{number}",
    ),
    "spec.runner.podAnnotations{}": Row(valid=("", '{"a": [1]}')),
    "spec.cache": Row(bad=({"claimName": "cache", "sizeLimit": "1Gi"},)),
    "spec.cache.claimName": Row(valid=("other", "a.b", "0"), bad=_NOT_NAMES, base={"cache": {"claimName": "cache"}}),
    "spec.cache.sizeLimit": Row(valid=("2G", 2**30, *_EDGES), bad=_NOT_QUANTITIES),
    "spec.serving.apiKeySecretRef.name": _NAME,
    "spec.serving.apiKeySecretRef.key": Row(valid=("A_b-c.d",), bad=("no/key", "é", "", "a b")),
    "spec.restartPolicy.backoff": Row(
        valid=({"initial": "5m"}, {"max": "1s"}),
        bad=({"initial": "10s", "max": "5s"}, {"initial": "10m"}),
    ),
    **{f"spec.deadlines.{name}": _BRIEF_DURATION for name in GOOD["deadlines"]},
    # Those that a runner keeps: one that no engine can hold makes the group fail.
    **{f"spec.deadlines.{name}": _STEP for name in ("download", "connect", "load", "warmup", "progress")},
    "spec.restartPolicy.backoff.initial": Row(
        valid=("1ms", "4m", "007s"), bad=(*_DURATION.bad, "999999h999999h", "5m"), letters=_DURATION.letters
    ),
    "spec.restartPolicy.backoff.max": Row(
        valid=("3s", "1h30m", "999999h999999h"), bad=(*_DURATION.bad, "1ms"), letters=_DURATION.letters
    ),
    "spec.restartPolicy.resetAfter": _DURATION,
}
"""By the name of the field."""
