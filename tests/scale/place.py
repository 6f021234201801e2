"""An API server of its own, the instant kubelet, and what an operator's process shows of itself."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from mlx_operator.act.kube import Kube, configuration
from tests.apiserver.harness import (
    NAMESPACES,
    SERVICE_ACCOUNTS,
    OperatorProcess,
    World,
    eventually,
    install,
)
from tests.apiserver.ports import free_port
from tests.cluster.apiserver import ApiServer
from tests.cluster.waiting import Progress
from tests.scale.kubelet import InstantKubelet

NAMESPACE = "scale"
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Watched:
    """An operator's process, looked at from outside and through its metrics."""

    process: OperatorProcess
    port: int

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.process.pid

    def memory(self) -> tuple[float, float]:
        """Resident memory now and at its highest, in MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        now, high = (int(found[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return now * 1024 / _MIB, high * 1024 / _MIB

    def cpu(self) -> float:
        """Seconds of CPU used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def metrics(self) -> dict[str, float]:
        """Every sample: `name` or `name{label=value,…}`, labels in order of their names."""
        assert self.process.process.returncode is None, f"the operator ended:\n{self.process.lines()[-3000:]}"
        timeout = aiohttp.ClientTimeout(total=30)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"http://127.0.0.1:{self.port}/metrics") as answer,
        ):
            text = await answer.text()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return {_named(sample.name, sample.labels): sample.value for sample in samples}

    async def settled_with(self, streams: int) -> bool:
        """It hears every runner and has nothing left to do."""
        try:
            seen = await self.metrics()
        except (aiohttp.ClientError, TimeoutError):
            return False
        return seen.get("mlx_operator_report_streams") == streams and seen.get("mlx_operator_queue_depth") == 0


def _named(name: str, labels: dict[str, str]) -> str:
    inner = ",".join(f"{label}={labels[label]}" for label in sorted(labels))
    return f"{name}{{{inner}}}" if inner else name


async def watched(place: World, *flags: str) -> Watched:
    """Start an operator whose metrics can be read.

    Without a Lease: on a machine that the API server, the kubelet and the operator fill together it may not be renewed
    in time, and its loss, which ends an operator, is not what is looked at here.
    """
    port = free_port()
    return Watched(await place.operator(f"--metrics-bind=127.0.0.1:{port}", "--no-leader-elect", *flags), port)


@asynccontextmanager
async def place(folder: Path, progress: Progress) -> AsyncIterator[World]:
    """A namespace for many instances; everything in it goes with its API server."""
    with ApiServer(folder / "apiserver", controllers=False, progress=progress) as bare:
        await asyncio.to_thread(install, bare)
        with ApiServer(folder / "apiserver", progress=progress) as server:
            async with _world(server, folder) as made:
                yield made


@asynccontextmanager
async def _world(server: ApiServer, folder: Path) -> AsyncIterator[World]:
    kubeconfig = server.user_kubeconfig(folder / "kubelet.kubeconfig", "fake-kubelet", ["system:masters"])
    settings = await configuration(str(kubeconfig))
    tls = ssl.create_default_context(cafile=settings.ssl_ca_cert)
    tls.load_cert_chain(settings.cert_file, settings.key_file)
    kube = Kube(settings)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), read_bufsize=1 << 21) as session:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
            await kube.create(NAMESPACES, None, body)

            async def admitted() -> bool:
                return bool((await kube.list(SERVICE_ACCOUNTS, NAMESPACE))[0])

            await eventually(admitted, "the namespace has a service account")
            async with InstantKubelet(kube, session, server.url, NAMESPACE, folder) as kubelet:
                made = World(server, kube, kubelet, NAMESPACE, folder)
                try:
                    yield made
                finally:
                    await made.end_operators()
    finally:
        await kube.close()
        await asyncio.sleep(0.25)  # TLS connections say goodbye in the background; aiohttp offers nothing to await
