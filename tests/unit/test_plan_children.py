"""The children: what a pod looks like, what its hash covers, and whose objects are left alone."""

import json
from dataclasses import replace
from typing import Any

import pytest

from mlx_operator.decide import service, template
from mlx_operator.decide.actions import ApplyService, CreatePod, DeletePod
from mlx_operator.decide.observed import Settings
from mlx_operator.decide.spec import Wanted, parse
from mlx_operator_api import names
from mlx_operator_api.conditions import ConditionType, Reason
from tests.unit.simulated_supervisor import UID
from tests.unit.simulator import Cluster

SETTINGS = Settings(runner_image="runner:1", key_id="abcdef0123")


def wanted(**spec: Any) -> Wanted:
    return parse(Cluster(**spec).instance)


def pod(rank: int = 0, settings: Settings = SETTINGS, **spec: Any) -> dict[str, Any]:
    return template.pod(wanted(**spec), rank, "runner:1", settings)


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["containers"][0]
    return found


def test_a_pod_passes_the_restricted_profile() -> None:
    manifest = pod()
    security, box = manifest["spec"]["securityContext"], container(manifest)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == 65532
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert box == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert manifest["spec"]["automountServiceAccountToken"] is False
    assert manifest["spec"]["enableServiceLinks"] is False
    assert not any("hostPath" in volume for volume in manifest["spec"]["volumes"])


def test_a_pod_knows_who_it_is() -> None:
    env = {entry["name"]: entry for entry in container(pod(1))["env"]}
    assert env[names.ENV_RANK]["value"] == "1"
    assert env[names.ENV_UID]["value"] == UID
    assert env[names.ENV_POD_IP]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    assert env[names.ENV_GRACE]["value"] == "40"


def test_the_users_environment_never_overrides_ours() -> None:
    chosen = [{"name": names.ENV_RANK, "value": "9"}, {"name": "MINE", "value": "1"}]
    env = [(e["name"], e.get("value")) for e in container(pod(runner={"env": chosen}))["env"]]
    assert (names.ENV_RANK, "9") not in env
    assert ("MINE", "1") in env
    assert len({name for name, _ in env}) == len(env)


def test_users_labels_are_kept_and_never_override_ours() -> None:
    chosen = {"team": "a", names.RANK_LABEL: "7", "app.kubernetes.io/name": "x"}
    found = pod(1, runner={"podLabels": chosen, "podAnnotations": {"note": "b"}})["metadata"]
    assert found["labels"]["team"] == "a"
    assert found["labels"][names.RANK_LABEL] == "1"
    assert found["labels"]["app.kubernetes.io/name"] == "mlx-runner"
    assert found["annotations"]["note"] == "b"
    assert found["labels"][names.INSTANCE_UID_LABEL] == UID


def test_a_child_belongs_to_its_instance_without_blocking_its_deletion() -> None:
    for manifest in (pod(), service.manifest(wanted())):
        (owner,) = manifest["metadata"]["ownerReferences"]
        assert owner["uid"] == UID
        assert owner["controller"] is True
        assert owner["blockOwnerDeletion"] is False


def test_the_grace_period_follows_the_shutdown_deadline_and_is_at_least_thirty_seconds() -> None:
    assert pod(deadlines={"shutdown": "5s"})["spec"]["terminationGracePeriodSeconds"] == 30
    assert pod()["spec"]["terminationGracePeriodSeconds"] == 40
    assert pod(deadlines={"shutdown": "2m"})["spec"]["terminationGracePeriodSeconds"] == 130


def test_a_lost_node_is_tolerated_for_thirty_seconds_unless_the_user_says_otherwise() -> None:
    taint = "node.kubernetes.io/not-ready"
    plain = {t["key"]: t["tolerationSeconds"] for t in pod()["spec"]["tolerations"]}
    assert plain == {taint: 30, "node.kubernetes.io/unreachable": 30}
    own = {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
    chosen = pod(runner={"tolerations": [own]})["spec"]["tolerations"]
    assert [t["tolerationSeconds"] for t in chosen if t["key"] == taint] == [300]
    everything = pod(runner={"tolerations": [{"operator": "Exists"}]})["spec"]["tolerations"]
    assert everything == [{"operator": "Exists"}]


@pytest.mark.parametrize(
    ("source", "volume"),
    [
        ("pvc://models/a/b", {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}),
        ("oci://registry.example/m:1", {"image": {"reference": "registry.example/m:1"}}),
    ],
)
def test_the_model_is_mounted_read_only(source: str, volume: dict[str, Any]) -> None:
    manifest = pod(model={"source": source})
    (found,) = [v for v in manifest["spec"]["volumes"] if v["name"] == "model"]
    assert {key: value for key, value in found.items() if key != "name"} == volume
    (mount,) = [m for m in container(manifest)["volumeMounts"] if m["name"] == "model"]
    assert mount == {"name": "model", "mountPath": names.MODEL_MOUNT, "readOnly": True}


def test_a_token_for_the_hub_comes_from_its_secret_and_goes_before_the_users_own() -> None:
    own = [{"name": "HF_TOKEN", "value": "mine"}, {"name": "HF_ENDPOINT", "value": "http://mirror"}]
    given = {"source": "hf://org/tiny", "credentialsSecretRef": {"name": "hf"}}
    env = {e["name"]: e for e in container(pod(model=given, runner={"env": own}))["env"]}
    assert env["HF_TOKEN"] == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}
    assert env["HF_ENDPOINT"]["value"] == "http://mirror"
    for source in ("hf://org/tiny", "pvc://models/tiny"):
        ref = {} if source.startswith("hf") else {"credentialsSecretRef": {"name": "hf"}}
        manifest = pod(model={"source": source, **ref}, runner={"env": own})
        assert [e.get("value") for e in container(manifest)["env"] if e["name"] == "HF_TOKEN"] == ["mine"]


def test_the_cache_is_an_empty_dir_with_its_limit_told_or_a_claim() -> None:
    def cache(**fields: Any) -> tuple[dict[str, Any], str | None]:
        manifest = pod(model={"source": "hf://org/tiny"}, **fields)
        (volume,) = [v for v in manifest["spec"]["volumes"] if v["name"] == "cache"]
        env = {e["name"]: e.get("value") for e in container(manifest)["env"]}
        return {k: v for k, v in volume.items() if k != "name"}, env.get(names.ENV_CACHE_BYTES)

    assert cache() == ({"emptyDir": {}}, None)
    assert cache(cache={"sizeLimit": "20Gi"}) == ({"emptyDir": {"sizeLimit": "20Gi"}}, str(20 * 2**30))
    assert cache(cache={"claimName": "models"}) == ({"persistentVolumeClaim": {"claimName": "models"}}, None)


def test_a_hub_source_mounts_no_model() -> None:
    manifest = pod(model={"source": "hf://org/tiny@v1"})
    assert not [v for v in manifest["spec"]["volumes"] if v["name"] == "model"]


def test_another_secret_needs_another_pod_but_another_repository_does_not() -> None:
    def hashed(**model: Any) -> str:
        return template.template_hash(wanted(model=model), "runner:1", SETTINGS)

    known = hashed(source="hf://a/b")
    assert hashed(source="hf://c/d@v1") == known
    assert hashed(source="hf://a/b", credentialsSecretRef={"name": "hf"}) != known
    mounted = hashed(source="pvc://models/tiny")
    assert hashed(source="pvc://models/tiny", credentialsSecretRef={"name": "hf"}) == mounted != known


def test_an_adapter_of_the_hub_needs_no_volume_and_the_token_of_the_model() -> None:
    model = {"source": "pvc://models/a", "credentialsSecretRef": {"name": "hf"}}
    manifest = pod(model={**model, "adapter": {"source": "hf://a/b"}})
    assert "adapter" not in {v["name"] for v in manifest["spec"]["volumes"]}
    (token,) = [v for v in container(manifest)["env"] if v["name"] == names.HUB_TOKEN_ENV]
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hf", "key": names.HUB_TOKEN_KEY}
    assert not [v for v in container(pod(model=model))["env"] if v["name"] == names.HUB_TOKEN_ENV]
    mark = names.TEMPLATE_HASH_ANNOTATION
    hashes = {
        pod(model={**model, "adapter": {"source": source}})["metadata"]["annotations"][mark]
        for source in ("hf://a/b", "hf://c/d@v1")
    }
    assert len(hashes) == 1, "another adapter of the hub needs no other pod"


def test_an_adapter_has_a_volume_of_its_own_that_belongs_to_the_template() -> None:
    model = {"source": "pvc://models/a", "adapter": {"source": "oci://registry.example/adapter:1"}}
    manifest = pod(model=model)
    (found,) = [v for v in manifest["spec"]["volumes"] if v["name"] == "adapter"]
    assert found == {"name": "adapter", "image": {"reference": "registry.example/adapter:1"}}
    (mount,) = [m for m in container(manifest)["volumeMounts"] if m["name"] == "adapter"]
    assert mount == {"name": "adapter", "mountPath": names.ADAPTER_MOUNT, "readOnly": True}
    mark = names.TEMPLATE_HASH_ANNOTATION
    hashes = {
        pod(model={**model, "adapter": {"source": source}})["metadata"]["annotations"][mark]
        for source in ("pvc://models/b", "pvc://models/c", "pvc://other/b", "oci://registry.example/adapter:1")
    }
    assert len(hashes) == 3, "another path in one claim needs no other pod"


def test_every_mount_has_a_volume_and_every_volume_a_mount() -> None:
    for source in ("pvc://models/a", "oci://registry.example/m:1"):
        manifest = pod(model={"source": source})
        mounts = [mount["name"] for mount in container(manifest)["volumeMounts"]]
        assert sorted(mounts) == sorted(volume["name"] for volume in manifest["spec"]["volumes"])


@pytest.mark.parametrize(("reference", "key"), [({"name": "keys"}, "api-key"), ({"name": "keys", "key": "k"}, "k")])
def test_the_keys_of_clients_are_mounted_where_clients_come(reference: dict[str, Any], key: str) -> None:
    serving = {"apiKeySecretRef": reference}
    manifest = pod(serving=serving)
    (volume,) = [v for v in manifest["spec"]["volumes"] if v["name"] == "api-keys"]
    items = [{"key": key, "path": "api-key"}]
    assert volume["secret"] == {"secretName": "keys", "items": items, "defaultMode": 0o440}
    (mount,) = [m for m in container(manifest)["volumeMounts"] if m["name"] == "api-keys"]
    assert mount == {"name": "api-keys", "mountPath": names.API_KEY_MOUNT, "readOnly": True}
    env = {entry["name"]: entry.get("value") for entry in container(manifest)["env"]}
    assert env[names.ENV_API_KEY_FILE] == f"{names.API_KEY_MOUNT}/api-key"
    assert "api-key" not in json.dumps(pod(1, serving=serving)["spec"]), "only rank 0 has clients"


def test_other_keys_need_other_pods_and_none_need_none() -> None:
    def found(**spec: Any) -> str:
        return template.template_hash(wanted(**spec), "runner:1", SETTINGS)

    plain = found()
    assert found(serving={"maxQueue": 3}) == plain
    hashes = {
        found(serving={"apiKeySecretRef": one}) for one in ({"name": "a"}, {"name": "b"}, {"name": "a", "key": "k"})
    }
    assert len(hashes | {plain}) == 4


def test_fields_of_spec_runner_reach_the_pod() -> None:
    runner = {
        "resources": {"limits": {"memory": "1Gi", "cpu": 2}},
        "nodeSelector": {"a": "b"},
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 1}],
        "priorityClassName": "high",
        "runtimeClassName": "kata",
        "serviceAccountName": "sa",
        "imagePullSecrets": [{"name": "pull"}],
    }
    spec = pod(runner=runner)["spec"]
    assert spec["containers"][0]["resources"] == {"limits": {"memory": "1Gi", "cpu": 2}}
    for field in ("nodeSelector", "affinity", "topologySpreadConstraints", "priorityClassName", "imagePullSecrets"):
        assert spec[field] == runner[field]
    assert spec["runtimeClassName"] == "kata"
    assert spec["serviceAccountName"] == "sa"
    json.dumps(pod(runner=runner))


def test_the_pull_policy_is_kubernetes_own_unless_the_operator_is_told() -> None:
    assert "imagePullPolicy" not in container(pod())
    chosen = replace(SETTINGS, image_pull_policy="Never")
    manifest = pod(settings=chosen, model={"source": "oci://m:1"})
    assert container(manifest)["imagePullPolicy"] == "Never"
    assert [v["image"]["pullPolicy"] for v in manifest["spec"]["volumes"] if "image" in v] == ["Never"]


def test_the_hash_does_not_depend_on_the_operators_release_or_the_rank() -> None:
    """Raising this value restarts every model on an upgrade of the operator: it needs a very good reason."""
    known = template.template_hash(wanted(), "runner:1", SETTINGS)
    assert known == "default-c770ae2a17"
    annotations = {pod(rank)["metadata"]["annotations"][names.TEMPLATE_HASH_ANNOTATION] for rank in range(2)}
    assert annotations == {known}


def test_the_hash_ignores_what_needs_no_other_pod() -> None:
    known = template.template_hash(wanted(), "runner:1", SETTINGS)
    specs: tuple[dict[str, Any], ...] = (
        {"model": {"source": "pvc://models/other"}},
        {"serving": {"maxQueue": 1}},
        {"sharding": "Tensor"},
        {"runners": 5},
        {"deadlines": {"load": "1h"}},
        {"restartPolicy": {"maxRestarts": 1}},
        {"runner": {}},
    )
    for spec in specs:
        assert template.template_hash(wanted(**spec), "runner:1", SETTINGS) == known, spec


def test_a_service_is_corrected_only_where_it_differs_from_what_we_set() -> None:
    cluster = Cluster()
    cluster.run()
    assert cluster.service is not None
    spec = cluster.service["spec"]
    spec |= {"clusterIP": "10.96.0.7", "sessionAffinity": "None", "type": "ClusterIP"}
    spec["ports"][0]["nodePort"] = 30000
    cluster.service["metadata"]["labels"]["added"] = "by somebody"
    assert cluster.reconcile().actions == ()
    spec["selector"] = {"app": "other"}
    assert [type(a) for a in cluster.reconcile().actions] == [ApplyService]
    assert cluster.service["spec"]["selector"] == {names.INSTANCE_LABEL: "tiny", names.RANK_LABEL: "0"}


def test_a_missing_service_is_made_again() -> None:
    cluster = Cluster()
    cluster.run()
    cluster.service = None
    assert [type(a) for a in cluster.reconcile().actions] == [ApplyService]


def test_a_service_of_somebody_else_is_left_alone_and_named() -> None:
    cluster = Cluster()
    cluster.service = {"metadata": {"name": "tiny", "uid": "x"}, "spec": {}}
    cluster.run()
    stalled = cluster.status.condition(ConditionType.STALLED)
    assert stalled is not None
    assert (stalled.status, stalled.reason) == ("True", Reason.CHILD_CONFLICT)
    assert "Service tiny" in stalled.message
    assert cluster.service["spec"] == {}
    cluster.service = None
    cluster.run()
    assert cluster.ready()


def test_a_pod_of_somebody_else_is_left_alone_and_named() -> None:
    donor = Cluster()
    donor.run()
    foreign = donor.pods["tiny-1"]
    foreign.manifest["metadata"]["ownerReferences"] = [
        {"kind": "ReplicaSet", "name": "web", "uid": "y", "controller": True}
    ]
    cluster = Cluster()
    cluster.pods["tiny-1"] = foreign
    cluster.reconcile()
    stalled = cluster.status.condition(ConditionType.STALLED)
    assert stalled is not None
    assert stalled.reason is Reason.CHILD_CONFLICT
    assert "ReplicaSet web" in stalled.message
    assert cluster.created == ["tiny-0"]


def test_a_pod_that_is_over_is_replaced_and_not_in_a_hot_loop() -> None:
    cluster = Cluster()
    cluster.run(until=lambda: len(cluster.pods) == 2)
    status = cluster.pods["tiny-1"].manifest["status"]
    status |= {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no devices"}
    made = cluster.reconcile(act=False)
    assert not [a for a in made.actions if isinstance(a, DeletePod)]
    scheduled = cluster.status.condition(ConditionType.SCHEDULED)
    assert scheduled is not None
    assert "UnexpectedAdmissionError, no devices" in scheduled.message
    cluster.wait(11)
    made = cluster.reconcile(act=False)
    assert [a.name for a in made.actions if isinstance(a, DeletePod)] == ["tiny-1"]


def test_each_child_is_created_once() -> None:
    cluster = Cluster(runners=3)
    cluster.run()
    made = plan_types(cluster)
    assert made == []
    assert sorted(cluster.created) == ["tiny-0", "tiny-1", "tiny-2"]


def plan_types(cluster: Cluster) -> list[type]:
    return [type(a) for a in cluster.reconcile().actions if isinstance(a, CreatePod | ApplyService | DeletePod)]
