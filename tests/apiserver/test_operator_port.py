"""The port to the Kubernetes API against the real server: every refusal is an error with its words."""

import asyncio
import socket
from typing import Any

import pytest

from mlx_operator.act.kube import MAX_MESSAGE, PAGE, Kube, KubeError, configuration
from mlx_operator.act.resources import INSTANCES, PODS, SECRETS, SERVICES, Resource
from mlx_operator.act.tokens import UnusableKeyError, operator_key
from tests.apiserver.harness import World

CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


async def test_a_list_goes_through_all_pages_and_says_its_version(place: World) -> None:
    wanted = {f"m{number:04d}" for number in range(PAGE + 7)}
    for name in sorted(wanted):
        await place.kube.create(CONFIG_MAPS, place.namespace, config_map(name))
    items, version = await place.kube.list(CONFIG_MAPS, place.namespace)
    assert wanted <= {item["metadata"]["name"] for item in items}
    assert int(version) >= max(int(item["metadata"]["resourceVersion"]) for item in items)


async def test_a_taken_name_is_already_exists(place: World) -> None:
    await place.kube.create(CONFIG_MAPS, place.namespace, config_map("one"))
    with pytest.raises(KubeError) as error:
        await place.kube.create(CONFIG_MAPS, place.namespace, config_map("one"))
    assert (error.value.status, error.value.reason) == (409, "AlreadyExists")
    assert not error.value.transient


async def test_a_stale_version_is_a_conflict(place: World) -> None:
    made = await place.kube.create(CONFIG_MAPS, place.namespace, config_map("one"))
    await place.kube.replace(CONFIG_MAPS, place.namespace, "one", {**made, "data": {"a": "1"}})
    with pytest.raises(KubeError) as error:
        await place.kube.replace(CONFIG_MAPS, place.namespace, "one", {**made, "data": {"a": "2"}})
    assert (error.value.status, error.value.reason) == (409, "Conflict")


async def test_a_deletion_takes_only_the_very_object(place: World) -> None:
    made = await place.kube.create(CONFIG_MAPS, place.namespace, config_map("one"))
    with pytest.raises(KubeError) as error:
        await place.kube.delete(CONFIG_MAPS, place.namespace, "one", uid="11111111-1111-1111-1111-111111111111")
    assert error.value.status == 409
    await place.kube.delete(CONFIG_MAPS, place.namespace, "one", uid=made["metadata"]["uid"])
    with pytest.raises(KubeError) as gone:
        await place.kube.get(CONFIG_MAPS, place.namespace, "one")
    assert gone.value.status == 404


async def test_a_status_field_that_the_crd_does_not_know_is_refused_in_few_words(place: World) -> None:
    await place.create()
    body = {"status": {"tokensPerSecond": 3}}
    with pytest.raises(KubeError) as error:
        await place.kube.merge_patch(INSTANCES, place.namespace, "tiny", body, subresource="status")
    assert error.value.status == 422
    assert "tokensPerSecond" in error.value.message
    assert len(error.value.message) <= MAX_MESSAGE


async def test_a_pod_with_fields_that_a_client_model_would_refuse_is_created(place: World) -> None:
    container = {"name": "c", "image": "c:1", "resources": {"requests": {"cpu": 1}}}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}}
    made = await place.kube.create(PODS, place.namespace, body)
    assert made["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "1"
    await place.kube.delete(PODS, place.namespace, "p", uid=made["metadata"]["uid"], grace_seconds=0)


async def test_a_malformed_apply_is_no_transient_error(place: World) -> None:
    body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"notAField": 1}}
    with pytest.raises(KubeError) as error:
        await place.kube.apply(SERVICES, place.namespace, "s", body, force=True)
    assert error.value.status == 422
    assert not error.value.transient


async def test_an_apply_with_a_uid_does_not_take_over_a_namesake(place: World) -> None:
    body = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}
    await place.kube.create(SERVICES, place.namespace, body)
    body["metadata"] = {"name": "s", "uid": "11111111-1111-1111-1111-111111111111"}
    with pytest.raises(KubeError) as error:
        await place.kube.apply(SERVICES, place.namespace, "s", body, force=True)
    assert error.value.status == 409


async def test_no_answer_is_status_0_and_comes_in_time(place: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = await configuration(str(place.server.kubeconfig))
        settings.host = f"https://127.0.0.1:{silent.getsockname()[1]}"
        kube = Kube(settings)
        async with asyncio.timeout(20):
            with pytest.raises(KubeError) as error:
                await kube.get(PODS, place.namespace, "p", seconds=0.5)
        await kube.close()
    assert error.value.status == 0
    assert error.value.ambiguous


async def test_operators_that_start_together_agree_on_one_key(place: World) -> None:
    keys = await asyncio.gather(*(operator_key(place.kube, place.namespace, "key") for _ in range(5)))
    assert len({key.key_id for key in keys}) == 1
    assert len({key.token("uid") for key in keys}) == 1
    assert keys[0].token("uid") != keys[0].token("other")
    secret = await place.kube.get(SECRETS, place.namespace, "key")
    assert secret["immutable"] is True


async def test_a_secret_that_is_no_key_is_not_used(place: World) -> None:
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"password": "x"}}
    await place.kube.create(SECRETS, place.namespace, body)
    with pytest.raises(UnusableKeyError, match="--key-secret"):
        await operator_key(place.kube, place.namespace, "key")
