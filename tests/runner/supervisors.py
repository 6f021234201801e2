"""Real supervisor processes on loopback addresses, driven over their control API as the operator does it."""

import asyncio
import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

from mlx_operator_api import names
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.tasks import (
    ConnectToGroup,
    CreateRunner,
    DeadlineSeconds,
    DownloadModel,
    GroupCause,
    LoadModel,
    Peer,
    RunnerReport,
    ServingOptions,
    Sharding,
    Shutdown,
    StartWarmup,
    Task,
    TaskAnswer,
    TaskOutcome,
    TaskPhase,
    TaskRequest,
)
from mlx_runner import channel

ROOT = Path(__file__).resolve().parents[2]
FAKE_ENGINE = f"{sys.executable} {ROOT / 'tests/runner/fake_engine.py'}"
UID = "5f0c3a52-0000-4000-8000-000000000001"
TOKEN = "a-token-for-tests"
SOURCE = "pvc://models/tiny"
PATIENCE = 60.0
"""Seconds: a deadline for a busy machine, never the time that something should take."""


def loopback() -> str:
    """An address that no other test uses."""
    return f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(2, 254)}"  # noqa: S311


def write_model(directory: Path, *, layers: int = 4) -> Path:
    """Files that pass verification; no engine could load them."""
    directory.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": layers}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


class Pod:
    """One supervisor: what a runner pod is to the operator."""

    def __init__(self, rank: int, home: Path, models: Path, engine: str | None = FAKE_ENGINE) -> None:
        self.rank = rank
        self.host = loopback()
        self.home = home
        self.plan_file = home / "plan.json"
        self.reports: list[RunnerReport] = []
        # A test run in the background ignores SIGHUP, SIGINT and SIGQUIT; the engines that are killed by them must not.
        self.prefix = ["env", "--default-signal"]
        self._models = models
        self._environment: dict[str, str] = {}
        self._engine = engine
        self._news = asyncio.Event()
        self._stream: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._http: aiohttp.ClientSession | None = None

    # -- the process
    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    async def start(self, **environment: str) -> None:
        """Start the supervisor and read its report stream; a second time: its successor in the same pod."""
        state = self.home / "state"
        state.mkdir(parents=True, exist_ok=True)
        (self.home / "token").write_text(TOKEN)
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("api", "runner_image")),
            names.ENV_UID: UID,
            names.ENV_RANK: str(self.rank),
            names.ENV_TOKEN_FILE: str(self.home / "token"),
            names.ENV_STATE_DIR: str(state),
            names.ENV_MODEL_DIR: str(self._models),
            names.ENV_LISTEN_HOST: self.host,
            "FAKE_ENGINE_PLAN": str(self.plan_file),
            **({"MLX_RUNNER_ENGINE": self._engine} if self._engine else {}),
            **environment,
        }
        self._environment = env
        self.spawn()
        self._http = self._http or aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"})
        self.reports.clear()
        self._stream = asyncio.create_task(self._read_stream())
        await self.until(lambda report: True, "a first report")

    def spawn(self) -> None:
        """Start the process again, as it was started."""
        with (self.home / "log").open("ab") as log:
            argv = [*self.prefix, sys.executable, "-m", "mlx_runner"]
            self._process = subprocess.Popen(argv, env=self._environment, stderr=log)

    async def stop(self) -> None:
        """End whatever still lives."""
        if self._stream is not None:
            self._stream.cancel()
            await asyncio.gather(self._stream, return_exceptions=True)
        if self._http is not None:
            await self._http.close()
        if self._process is not None and self._process.poll() is None:
            for pid in [self.pid, *self.children()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()

    async def exit_code(self) -> int:
        assert self._process is not None
        return await asyncio.wait_for(asyncio.to_thread(self._process.wait), PATIENCE)

    def children(self) -> list[int]:
        """Living children of the supervisor, zombies included."""
        try:
            text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in text.split()]

    def engines(self) -> list[int]:
        """The engines in use (one at most, or the product is wrong); where none is, those that stand by."""
        children = self.children()
        return [pid for pid in children if _name(pid) == channel.ENGINE_NAME] or children

    def spares(self) -> list[int]:
        """Engines that stand by beside the one in use."""
        return [pid for pid in self.children() if pid not in self.engines()]

    def plan(self, **plan: Any) -> None:
        """What the fake engine does from its next command on."""
        # Whole at once: engines may read it at any time.
        new = self.plan_file.with_suffix(".new")
        new.write_text(json.dumps(plan))
        new.replace(self.plan_file)

    def kill_whole(self) -> None:
        """SIGKILL for the supervisor and its engines together: none of them sees another one die."""
        engines = self.children()
        os.kill(self.pid, signal.SIGSTOP)
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        os.kill(self.pid, signal.SIGKILL)

    # -- reports
    @property
    def report(self) -> RunnerReport:
        return self.reports[-1]

    async def until(self, condition: Callable[[RunnerReport], bool], what: str) -> RunnerReport:
        """Wait for a report."""
        try:
            async with asyncio.timeout(PATIENCE):
                seen = 0
                while True:
                    for report in self.reports[seen:]:
                        if condition(report):
                            return report
                    seen = len(self.reports)
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            last = self.reports[-1].model_dump_json(exclude_none=True) if self.reports else "no report"
            raise AssertionError(f"rank {self.rank}: no {what}; last: {last}\n{self.log}") from None

    async def state(self, state: RunnerState, epoch: int) -> RunnerReport:
        return await self.until(lambda r: r.state is state and r.epoch == epoch, f"{state} of epoch {epoch}")

    async def outcome(self, name: TaskName, epoch: int, *phases: TaskPhase, attempt: int = 1) -> TaskOutcome:
        """Wait until a task has come to one of the phases."""

        def found(report: RunnerReport) -> TaskOutcome | None:
            mine = (t for t in report.tasks if (t.name, t.epoch, t.attempt) == (name, epoch, attempt))
            return next((t for t in mine if t.phase in phases), None)

        outcome = found(await self.until(lambda r: found(r) is not None, f"{name} {phases}"))
        assert outcome is not None
        return outcome

    async def _read_stream(self) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                async with self.http.get(self.url("/reports"), timeout=_FOREVER) as response:
                    async for line in response.content:
                        self.reports.append(RunnerReport.model_validate_json(line))
                        self._news.set()
            await asyncio.sleep(0.02)

    # -- HTTP
    @property
    def http(self) -> aiohttp.ClientSession:
        assert self._http is not None
        return self._http

    def url(self, path: str, port: int = names.CONTROL_PORT) -> str:
        return f"http://{self.host}:{port}{path}"

    async def status(self, path: str, port: int = names.CONTROL_PORT) -> int:
        async with self.http.get(self.url(path, port)) as response:
            return response.status

    def request(self, task: Task, epoch: int = 1, **fields: Any) -> TaskRequest:
        return TaskRequest.model_validate(
            {"instance_uid": UID, "rank": self.rank, "epoch": epoch, "task": task, **fields}
        )

    async def post(self, request: TaskRequest) -> tuple[int, str]:
        body = request.model_dump_json(by_alias=True)
        async with self.http.post(self.url("/tasks"), data=body) as response:
            return response.status, await response.text()

    async def send(self, task: Task, epoch: int = 1, **fields: Any) -> TaskAnswer:
        status, text = await self.post(self.request(task, epoch, **fields))
        assert status == 200, text
        return TaskAnswer.model_validate_json(text)


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


_FOREVER = aiohttp.ClientTimeout(total=None, sock_connect=5)


class Group:
    """The pods of an instance, and the operator's part of the lifecycle."""

    def __init__(self, pods: list[Pod]) -> None:
        self.pods = pods
        self.deadlines = DeadlineSeconds()
        self.serving = ServingOptions()
        self.cause: GroupCause | None = None
        self.sharding = Sharding.PIPELINE
        self.memory_limits: tuple[int | None, ...] = ()

    @property
    def base_url(self) -> str:
        return self.pods[0].url("/v1", names.PUBLIC_PORT)

    async def all(self, task: Task, state: RunnerState, epoch: int) -> None:
        for pod in self.pods:
            answer = await pod.send(task, epoch)
            assert answer.outcome.phase is not TaskPhase.REJECTED, answer.outcome.rejection
        for pod in self.pods:
            await pod.state(state, epoch)

    async def create(self, epoch: int = 1, source: str = SOURCE, adapter: str | None = None) -> None:
        task = CreateRunner(
            world_size=len(self.pods),
            source=source,
            adapter=adapter,
            served_name="tiny",
            sharding=self.sharding,
            deadlines=self.deadlines,
            serving=self.serving,
            memory_limits=self.memory_limits,
            cause=self.cause,
        )
        await self.all(task, RunnerState.IDLE, epoch)

    async def download(self, epoch: int = 1) -> None:
        for pod in self.pods:
            await pod.send(DownloadModel(), epoch)
        for pod in self.pods:
            outcome = await pod.outcome(TaskName.DOWNLOAD_MODEL, epoch, TaskPhase.COMPLETE, TaskPhase.FAILED)
            assert outcome.phase is TaskPhase.COMPLETE, outcome.message

    def peers(self) -> ConnectToGroup:
        return ConnectToGroup(
            peers=tuple(Peer(rank=pod.rank, pod_ip=pod.host, port=names.FRAME_PORT) for pod in self.pods)
        )

    async def connect(self, epoch: int = 1) -> None:
        if len(self.pods) == 1:
            return
        if self.sharding is Sharding.TENSOR:
            # The last rank dials first: it is told when all others listen.
            for pod in self.pods[:-1]:
                await pod.send(self.peers(), epoch)
            for pod in self.pods[:-1]:
                await pod.until(lambda r: r.epoch == epoch and r.ring_listening, "a listening ring port")
            await self.pods[-1].send(self.peers(), epoch)
            for pod in self.pods:
                await pod.state(RunnerState.CONNECTED, epoch)
        else:
            await self.all(self.peers(), RunnerState.CONNECTED, epoch)

    async def loaded(self, epoch: int = 1) -> None:
        await self.create(epoch)
        await self.download(epoch)
        await self.connect(epoch)
        await self.all(LoadModel(), RunnerState.LOADED, epoch)

    async def ready(self, epoch: int = 1) -> None:
        """The whole lifecycle."""
        await self.loaded(epoch)
        await self.all(StartWarmup(), RunnerState.READY, epoch)

    async def shut_down(self, epoch: int = 1, grace: float = 0.0) -> None:
        await self.all(Shutdown(grace_seconds=grace), RunnerState.SHUTDOWN, epoch)


@contextlib.asynccontextmanager
async def group(
    home: Path, count: int, *, engine: str | None = FAKE_ENGINE, models: Path | None = None, **environment: str
) -> AsyncIterator[Group]:
    """Supervisors of `count` ranks; all of them are gone afterwards."""
    if models is None:
        models = home / "models"
        write_model(models / "tiny")
    pods = []
    for rank in range(count):
        (home / f"pod-{rank}").mkdir(exist_ok=True)
        pods.append(Pod(rank, home / f"pod-{rank}", models, engine))
    try:
        await asyncio.gather(*(pod.start(**environment) for pod in pods))
        yield Group(pods)
    finally:
        for pod in pods:
            await pod.stop()
