"""A real API server with the CRD and the chart's RBAC, operators as processes, and a fake kubelet."""

import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from mlx_operator.act.kube import Kube, KubeError, configuration
from mlx_operator.act.resources import EVENTS, INSTANCES, LEASES, PODS, SECRETS, SERVICES, Resource
from mlx_operator_api.conditions import ConditionType
from tests.apiserver.kubelet import Kubelet, python_path
from tests.apiserver.ports import free_port
from tests.cluster import binaries
from tests.cluster.apiserver import ApiServer
from tests.cluster.audit import AuditLog, Request
from tests.cluster.deploy import NAMESPACE, RELEASE, ROOT
from tests.cluster.waiting import tell, wait_until

OPERATOR = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
CONFINED_RELEASE = "confined"
CRDS = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
SERVICE_ACCOUNTS = Resource("", "v1", "serviceaccounts", "ServiceAccount")
Manifest = dict[str, Any]


async def eventually(check: Callable[[], Awaitable[Any]], what: str, seconds: float = 90.0) -> Any:
    """Wait until `check` returns something true, and return that; what it last returned is in the failure."""
    deadline = time.monotonic() + seconds
    while True:
        found = await check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}; last seen: {found!r}")
        await asyncio.sleep(0.05)


def condition(instance: Manifest, kind: ConditionType) -> Manifest:
    """A condition of an instance; empty before the first status."""
    conditions = instance.get("status", {}).get("conditions", ())
    return next((entry for entry in conditions if entry["type"] == kind), {})


def is_ready(instance: Manifest) -> bool:
    """The group answers, and status is about the present spec."""
    ready = condition(instance, ConditionType.READY)
    return ready.get("status") == "True" and ready.get("observedGeneration") == instance["metadata"]["generation"]


def again_in(epoch: int) -> Callable[[Manifest], bool]:
    """A check: Ready in this epoch."""
    return lambda instance: is_ready(instance) and instance["status"]["epoch"] == epoch


def allocator() -> dict[str, str]:
    """How the operator's image sets up memory allocation."""
    text = (ROOT / "operator/Dockerfile").read_text()
    found = dict(re.findall(r"\b(MALLOC_\w+)=(\w+)", text))
    assert len(found) == 2, found
    return found


class OperatorProcess:
    """`python -m mlx_operator`, as its Deployment would run it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, probes: int) -> None:
        self.process = process
        self.log = log
        self.probes = probes

    async def kill(self) -> None:
        """SIGKILL, and wait."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def stop(self) -> float:
        """SIGTERM; returns how long the end took, in seconds."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(self.process.wait(), 15)
        return time.monotonic() - began

    async def ready(self) -> bool:
        """What its readiness probe answers."""
        assert self.process.returncode is None, self.lines()
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
                session.get(f"http://127.0.0.1:{self.probes}/readyz") as answer,
            ):
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def leads(self) -> None:
        """Wait until it leads and has the whole picture."""

        async def seeded() -> bool:
            return "msg=seeded" in self.lines()

        await eventually(seeded, "the operator leads")

    def lines(self) -> str:
        """Its log."""
        return self.log.read_text()

    def when(self, message: str) -> datetime:
        """When it first logged a message, by its own clock."""
        text = json.dumps(message) if " " in message else message
        found = re.search(rf"^time=(\S+) level=\w+ msg={re.escape(text)}(?: |$)", self.lines(), re.MULTILINE)
        assert found is not None, f"no {message!r} in\n{self.lines()}"
        return datetime.fromisoformat(found[1])


class World:
    """One test's namespace, kubelet and operators on a shared API server."""

    def __init__(self, server: ApiServer, kube: Kube, kubelet: Kubelet, namespace: str, folder: Path) -> None:
        self.server = server
        self.kube = kube
        self.kubelet = kubelet
        self.namespace = namespace
        self.folder = folder
        self.audit = AuditLog(server.audit_log)
        self.user = OPERATOR
        """Who operators are to the API server."""
        self._operators: list[OperatorProcess] = []

    async def operator(self, *flags: str, ready: bool = True, replica: int = 0) -> OperatorProcess:
        """Start an operator with the chart's permissions; by default wait until it is ready."""
        number = len(self._operators)
        kubeconfig = self.folder / "operator.kubeconfig"
        self.server.user_kubeconfig(kubeconfig, self.user, groups_of(self.user))
        log, port = self.folder / f"operator-{number}.log", free_port()
        argv = ["--kubeconfig", str(kubeconfig), "--namespace", NAMESPACE, "--runner-image", "runner:1"]
        # As in a Deployment: a process that follows another one has the same pod, a second replica another one.
        pod = f"operator-{self.namespace}-{replica}"
        argv += ["--metrics-bind", "off", "--probes-bind", f"127.0.0.1:{port}", *flags]
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-W",
                "error::DeprecationWarning:mlx_operator",
                "-m",
                "mlx_operator",
                *argv,
                env={**os.environ, **allocator(), "PYTHONPATH": python_path(), "POD_NAME": pod},
                stdout=file,
                stderr=file,
            )
        started = OperatorProcess(process, log, port)
        self._operators.append(started)
        if ready:
            await eventually(started.ready, f"the operator is ready\n{log}")
        return started

    @asynccontextmanager
    async def deployment(self, *flags: str, replica: int = 0) -> AsyncIterator[list[OperatorProcess]]:
        """An operator that is started again whenever it ends, as its Deployment does; yields all so far."""
        started = [await self.operator(*flags, ready=False, replica=replica)]

        async def keep() -> None:
            while True:
                await started[-1].process.wait()
                await asyncio.sleep(0.5)
                started.append(await self.operator(*flags, ready=False, replica=replica))

        keeping = asyncio.create_task(keep(), name="deployment")
        try:
            yield started
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def clear(self) -> None:
        """Remove the instances; returns when their pods are gone."""
        for instance in (await self.kube.list(INSTANCES, self.namespace))[0]:
            await self.delete(instance["metadata"]["name"])
        await eventually(self._no_pods, "all pods are gone")

    async def close(self) -> None:
        """Remove the instances, then end the operators."""
        try:
            await self.clear()
        finally:
            await self.end_operators()

    async def end_operators(self) -> None:
        """SIGKILL to all."""
        for operator in self._operators:
            await operator.kill()

    async def _no_pods(self) -> bool:
        return not (await self.kube.list(PODS, self.namespace))[0]

    def confine(self) -> None:
        """Install the chart once more, for this namespace alone; operators are that release's from now on."""
        release = f"{CONFINED_RELEASE}-{RELEASE}"
        apply_chart(self.server, CONFINED_RELEASE, f"--set=watchNamespaces={{{self.namespace}}}")
        self.user = f"system:serviceaccount:{NAMESPACE}:{release}"

    # -- instances
    async def create(self, name: str = "tiny", **spec: Any) -> Manifest:
        """Create an instance of two runners."""
        body = {
            "apiVersion": INSTANCES.api_version,
            "kind": INSTANCES.kind,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"model": {"source": "pvc://models/tiny"}, "runners": 2, **spec},
        }
        return await self.kube.create(INSTANCES, self.namespace, body)

    async def get(self, name: str = "tiny") -> Manifest:
        """An instance."""
        return await self.kube.get(INSTANCES, self.namespace, name)

    async def delete(self, name: str = "tiny") -> None:
        """Delete an instance, as kubectl does."""
        try:
            instance = await self.get(name)
            await self.kube.delete(INSTANCES, self.namespace, name, uid=instance["metadata"]["uid"])
        except KubeError as error:
            if error.status != 404:
                raise

    async def until(
        self, check: Callable[[Manifest], bool], what: str, *, name: str = "tiny", seconds: float = 120.0
    ) -> Manifest:
        """Wait for a state of an instance; returns it."""
        seen: Manifest = {}

        async def look() -> bool:
            seen.clear()
            try:
                seen.update(await self.get(name))
            except KubeError:
                return False
            return check(seen)

        try:
            await eventually(look, what, seconds)
        except AssertionError as error:
            tails = "\n".join(operator.lines()[-3000:] for operator in self._operators)
            status = json.dumps(seen.get("status"), indent=1)
            raise AssertionError(f"{error}\nstatus: {status}\noperators:\n{tails}") from None
        return seen

    async def until_ready(self, name: str = "tiny", *, seconds: float = 120.0) -> Manifest:
        """Wait for Ready=True of the present generation."""
        return await self.until(is_ready, f"{name} is Ready", name=name, seconds=seconds)

    # -- what happened
    def writes(self, since: int = 0) -> list[Request]:
        """The operators' requests that changed something in the namespace, from the API server's audit log."""
        return [r for r in self.audit.writes(since, user=self.user) if r.namespace == self.namespace]

    def requests_that_created(self, resource: str) -> list[Request]:
        """The operators' creations of a kind that were carried out, whatever answer arrived."""
        return [r for r in self.writes() if r.verb == "create" and r.resource == resource and r.code == 201]

    async def pods(self) -> list[Manifest]:
        """All pods."""
        return (await self.kube.list(PODS, self.namespace))[0]

    async def children(self) -> list[str]:
        """Kind/name of every child that is left."""
        found = []
        for kind in (PODS, SERVICES, SECRETS):
            found += [f"{kind.plural}/{i['metadata']['name']}" for i in (await self.kube.list(kind, self.namespace))[0]]
        return found

    async def events(self) -> list[Manifest]:
        """Our Events, in the order of their names."""
        items, _ = await self.kube.list(EVENTS, self.namespace)
        ours = [item for item in items if item.get("reportingController", "").startswith("mlx-operator.dev/")]
        return sorted(ours, key=lambda item: str(item["metadata"]["name"]))

    async def settled(self, seconds: float = 1.0) -> None:
        """Wait until the operators have written nothing for a while."""
        mark, quiet = self.audit.mark(), time.monotonic()

        async def look() -> bool:
            nonlocal mark, quiet
            if self.writes(mark):
                mark, quiet = self.audit.mark(), time.monotonic()
            return time.monotonic() - quiet > seconds

        await eventually(look, "the operator writes nothing any more")


async def forget_leader(kube: Kube) -> None:
    """Delete the Lease, so that a test need not wait for one that a killed operator left behind."""
    try:
        lease = await kube.get(LEASES, NAMESPACE, RELEASE)
        await kube.delete(LEASES, NAMESPACE, RELEASE, uid=lease["metadata"]["uid"])
    except KubeError as error:
        if error.status != 404:
            raise


def groups_of(user: str) -> list[str]:
    """The groups that a service account is in."""
    if not user.startswith("system:serviceaccount:"):
        return []
    return ["system:serviceaccounts", f"system:serviceaccounts:{user.split(':')[2]}"]


def install(server: ApiServer) -> None:
    """Apply the CRD and the chart."""
    kubectl(server, "apply", "-f", str(ROOT / "crds"))
    # `kubectl wait` takes a CRD without any condition yet for an error.
    wait_until(lambda: server.api().request("GET", INSTANCES.path())[0] == 200, what="the kind is served", seconds=30)
    kubectl(server, "create", "namespace", NAMESPACE)
    apply_chart(server, RELEASE)


def apply_chart(server: ApiServer, release: str, *values: str, namespace: str = NAMESPACE) -> None:
    """Apply the chart's objects, without the Deployment: operators here are processes."""
    helm = binaries.ensure(tell, only={"helm"}) / "helm"
    argv = [str(helm), "template", release, str(ROOT / "helm" / "mlx-operator"), f"--namespace={namespace}", *values]
    text = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    objects = [item for item in yaml.safe_load_all(text) if item and item["kind"] != "Deployment"]
    kubectl(server, "apply", "-f", "-", stdin=yaml.safe_dump_all(objects))


def kubectl(server: ApiServer, *arguments: str, stdin: str | None = None) -> None:
    """Run kubectl as the administrator."""
    argv = [str(server.binaries / "kubectl"), f"--kubeconfig={server.kubeconfig}", *arguments]
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@asynccontextmanager
async def world(server: ApiServer, namespace: str, folder: Path, kind: type[Kubelet] = Kubelet) -> AsyncIterator[World]:
    """A world with a namespace and a kubelet of its own."""
    kubeconfig = folder / "kubelet.kubeconfig"
    server.user_kubeconfig(kubeconfig, "fake-kubelet", ["system:masters"])
    settings = await configuration(str(kubeconfig))
    tls = ssl.create_default_context(cafile=settings.ssl_ca_cert)
    tls.load_cert_chain(settings.cert_file, settings.key_file)
    kube = Kube(settings)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), read_bufsize=1 << 21) as session:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
            await kube.create(NAMESPACES, None, body)
            await forget_leader(kube)

            async def admitted() -> bool:
                return bool((await kube.list(SERVICE_ACCOUNTS, namespace))[0])

            await eventually(admitted, "the namespace has a service account")
            async with kind(kube, session, server.url, namespace, folder) as kubelet:
                made = World(server, kube, kubelet, namespace, folder)
                try:
                    yield made
                finally:
                    await made.close()
    finally:
        await kube.close()
        await asyncio.sleep(0.25)  # TLS connections say goodbye in the background; aiohttp offers nothing to await
