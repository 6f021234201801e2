"""What an operator says that cannot work, and an operator that is confined to a namespace."""

import asyncio
import json

import aiohttp

from mlx_operator.act.resources import INSTANCES, Resource
from tests.apiserver.harness import CRDS, World, eventually
from tests.apiserver.ports import free_port
from tests.cluster.deploy import NAMESPACE

ROLES = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDINGS = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")


async def refused(place: World, *flags: str) -> str:
    """The last line of an operator that must end with exit code 1."""
    operator = await place.operator(*flags, ready=False)
    assert await asyncio.wait_for(operator.process.wait(), 90) == 1, operator.lines()
    assert "Traceback" not in operator.lines()
    return operator.lines().strip().splitlines()[-1]


async def test_missing_permissions_are_one_sentence(place: World) -> None:
    place.user = "nobody-special"
    line = await refused(place, "--no-leader-elect")
    assert "cannot start" in line
    assert "Secret" in line


async def test_missing_permissions_on_what_is_watched_name_the_kind(place: World) -> None:
    place.user = "half-special"
    subject = {"kind": "User", "name": place.user, "apiGroup": "rbac.authorization.k8s.io"}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "half"}}
    rules = [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "create"]}]
    await place.kube.create(ROLES, NAMESPACE, {**role, "rules": rules})
    binding = {**role, "kind": "RoleBinding", "subjects": [subject]}
    reference = {"kind": "Role", "name": "half", "apiGroup": "rbac.authorization.k8s.io"}
    await place.kube.create(ROLE_BINDINGS, NAMESPACE, {**binding, "roleRef": reference})
    line = await refused(place, "--no-leader-elect")
    assert "RBAC does not let the operator see" in line
    assert "modelinstances" in line


async def test_a_lease_out_of_reach_is_one_sentence(place: World) -> None:
    line = await refused(place, "--lease-name", "somebody-elses")
    assert f"Lease {NAMESPACE}/somebody-elses" in line


async def test_an_unreachable_api_server_is_waited_for(place: World) -> None:
    await asyncio.to_thread(place.server.stop_apiserver)
    try:
        operator = await place.operator(ready=False)

        async def waits() -> bool:
            return "the Lease cannot be taken" in operator.lines()

        await eventually(waits, "it says what it waits for")
        assert not await operator.ready()
    finally:
        await asyncio.to_thread(place.server.start_apiserver)
    await operator.leads()
    await place.create(runners=1)
    await place.until_ready()


async def test_an_operator_confined_to_a_namespace_serves_it_without_cluster_wide_permissions(place: World) -> None:
    place.confine()
    mark = place.audit.mark()
    operator = await place.operator("--watch-namespace", place.namespace)
    await place.create(runners=1)
    await place.until_ready()
    seen = place.audit.requests(mark, user=place.user)
    assert {r.resource for r in seen if r.code == 403} == set()
    assert "nodes" not in {r.resource for r in seen}
    assert operator.process.returncode is None


async def test_its_logs_are_json_when_asked(place: World) -> None:
    operator = await place.operator("--log-format", "json")
    await place.create(runners=1)
    instance = await place.until_ready()
    lines = [json.loads(line) for line in operator.lines().splitlines()]
    sent = [line for line in lines if line["msg"].endswith(" sent")]
    assert [line["msg"].split()[0] for line in sent] == ["CreateRunner", "DownloadModel", "LoadModel", "StartWarmup"]
    assert {line["instance"] for line in sent} == {f"{place.namespace}/tiny"}
    assert {line["epoch"] for line in sent} == {instance["status"]["epoch"]}


async def test_its_metrics_say_what_it_did(place: World) -> None:
    port = free_port()
    operator = await place.operator("--metrics-bind", f"127.0.0.1:{port}")
    await place.create(runners=1)
    await place.until_ready()
    await place.settled()
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/metrics") as answer:
            text = await answer.text()
        async with session.get(f"http://127.0.0.1:{operator.probes}/healthz") as answer:
            assert answer.status == 200
    patches = sum(1 for r in place.writes() if r.resource == "modelinstances/status")
    for line in (
        f'mlx_operator_kube_requests_total{{resource="modelinstances/status",status="200",verb="patch"}} {patches}.0',
        'mlx_operator_instances{ready="True",reason="Ready"} 1.0',
        "mlx_operator_queue_depth 0.0",
        "mlx_operator_report_streams 1.0",
        "mlx_operator_leader 1.0",
        "mlx_operator_bugs_total 0.0",
    ):
        assert line in text.splitlines(), text


async def test_a_missing_crd_is_one_sentence(place: World) -> None:
    crd = await place.kube.get(CRDS, None, INSTANCES.plural + "." + INSTANCES.group)
    await place.kube.delete(CRDS, None, crd["metadata"]["name"], uid=crd["metadata"]["uid"])
    try:

        async def gone() -> bool:
            code, _ = place.server.api().request("GET", INSTANCES.path())
            return code == 404

        await eventually(gone, "the kind is gone")
        line = await refused(place)
        assert "install the CRD" in line
    finally:
        body = {key: crd[key] for key in ("apiVersion", "kind", "spec")} | {
            "metadata": {"name": crd["metadata"]["name"]}
        }
        await place.kube.create(CRDS, None, body)

        async def back() -> bool:
            code, _ = place.server.api().request("GET", INSTANCES.path())
            return code == 200

        await eventually(back, "the kind is back")
