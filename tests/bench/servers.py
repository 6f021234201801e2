"""The two servers: a group of real supervisors with their engines, and mlx_lm.server; both as processes over HTTP."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp

from mlx_operator_api.tasks import ServingOptions, Sharding
from tests.runner import supervisors
from tests.runner.engine_ranks import OPENBLAS

MODEL_NAME = "tiny"
"""Directory of the model, and the name that it is served by: that of tests/runner/supervisors.py."""
_START_SECONDS = 120.0
_REST_CORES = 0.05


@dataclass(frozen=True, slots=True)
class Shape:
    """How a model is spread."""

    ranks: int
    sharding: Sharding
    threads: int
    """Of BLAS, per rank."""

    def __str__(self) -> str:
        name = "1 rank" if self.ranks == 1 else f"{self.sharding.value.lower()} {self.ranks}"
        return f"{name}, {self.threads} BLAS thread{'s' if self.threads > 1 else ''} a rank"


class Server(Protocol):
    """What is measured."""

    name: str
    url: str
    model: str

    def ranks(self) -> list[list[int]]:
        """Processes of each rank."""

    def pause(self) -> None:
        """Use no CPU while the other one is measured."""

    def go_on(self) -> None:
        """Undo `pause`."""


class Ours:
    """Supervisors and engines, at rest while nobody asks them."""

    name = "mlx-operator"
    model = MODEL_NAME

    def __init__(self, group: supervisors.Group) -> None:
        self._group = group
        self.url = group.base_url.removesuffix("/v1")

    def ranks(self) -> list[list[int]]:
        """Supervisor and engine of each pod."""
        return [[pod.pid, *pod.engines()] for pod in self._group.pods]

    async def at_rest(self) -> None:
        """The spare engines are started once the group is Ready, and read their libraries beside the first answers."""
        deadline, busy = time.monotonic() + _START_SECONDS, True
        while busy:
            before = self._cpu_of_all()
            await asyncio.sleep(1.0)  # a measurement over a time
            busy = not all(pod.spares() for pod in self._group.pods) or self._cpu_of_all() - before > _REST_CORES
            if busy and time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} is still busy {_START_SECONDS:.0f} s after it was Ready")

    def _cpu_of_all(self) -> float:
        return sum(cpu_seconds([pod.pid, *pod.children()]) for pod in self._group.pods)

    def pause(self) -> None:
        """Nothing to do: an idle group sleeps."""

    def go_on(self) -> None:
        """Nothing to do."""


class Upstream:
    """mlx_lm.server, all ranks of it. Stopped while it is not measured: an idle rank > 0 polls a whole core."""

    name = "mlx_lm.server"

    def __init__(self, url: str, model: Path, processes: list[subprocess.Popen[bytes]]) -> None:
        self.url = url
        self.model = str(model)
        self._processes = processes

    def ranks(self) -> list[list[int]]:
        """One process a rank."""
        return [[process.pid] for process in self._processes]

    def pause(self) -> None:
        """Stop all its processes."""
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let them run again."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)


def _blas() -> dict[str, str]:
    return {"MLX_RUNNER_BLAS": str(OPENBLAS)} if OPENBLAS.exists() else {}


@contextlib.asynccontextmanager
async def ours(home: Path, models: Path, shape: Shape, serving: ServingOptions) -> AsyncIterator[Ours]:
    """Our server, ready."""
    environment = {"OPENBLAS_NUM_THREADS": str(shape.threads), **_blas()}
    async with supervisors.group(home, shape.ranks, engine=None, models=models, **environment) as group:
        group.sharding = shape.sharding
        group.serving = serving
        await group.ready()
        server = Ours(group)
        await server.at_rest()
        yield server


@contextlib.asynccontextmanager
async def upstream(home: Path, models: Path, shape: Shape) -> AsyncIterator[Upstream]:
    """mlx_lm.server, ready."""
    port, model = _free_port(), models / MODEL_NAME
    argv = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port)]
    argv += ["--log-level", "WARNING"]
    if shape.ranks > 1 and shape.sharding is Sharding.PIPELINE:
        argv.append("--pipeline")
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(shape.threads), "HF_HUB_OFFLINE": "1"}
    if OPENBLAS.exists():
        environment["LD_PRELOAD"] = str(OPENBLAS)
    with _processes(home, argv, environment, shape.ranks) as processes:
        server = Upstream(f"http://127.0.0.1:{port}", model, processes)
        try:
            await _wait_ready(server, processes)
            yield server
        except Exception as error:
            error.add_note(_logs(home))
            raise


@contextlib.contextmanager
def _processes(
    home: Path, argv: list[str], environment: dict[str, str], ranks: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    hosts = home / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{_free_port()}"] for _ in range(ranks)]))
    ring = {"MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
    processes = []
    try:
        for rank in range(ranks):
            with (home / f"mlx_lm-{rank}.log").open("wb") as log:
                mine = {**environment, **({**ring, "MLX_RANK": str(rank)} if ring else {})}
                processes.append(subprocess.Popen(argv, env=mine, stdout=log, stderr=log))
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(10)


async def _wait_ready(server: Upstream, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    async with aiohttp.ClientSession() as http:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with http.get(f"{server.url}/v1/models", timeout=aiohttp.ClientTimeout(5)) as response:
                    if response.status == 200:
                        return
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                raise RuntimeError(f"mlx_lm.server did not start within {_START_SECONDS:.0f} s")
            await asyncio.sleep(0.2)


def _logs(home: Path) -> str:
    logs = sorted(home.glob("mlx_lm-*.log"))
    return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of the living threads of some processes."""
    total = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int((thread / "schedstat").read_text().split()[0])
    return total / 1e9
