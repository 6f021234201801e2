"""Real engines as processes on loopback: each rank at an address of its own, driven through the real channel."""

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlx_operator_api.names import ring_port
from mlx_operator_api.tasks import Peer, Sharding
from mlx_runner import channel
from mlx_runner.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
OPENBLAS = Path("/usr/lib/x86_64-linux-gnu/openblas-pthread/libopenblas.so.0")
TOKEN = "a-shared-secret-of-the-instance"
SECONDS = 60.0
"""For anything that an engine is waited for."""

ENGINE = ("-m", "mlx_runner.engine")
FAULTY_ENGINE = (str(ROOT / "tests/runner/faulty_engine.py"),)
"""The same with a fault in it, as each rank's `plan_file` says."""
_E = TypeVar("_E")


class UnexpectedError(AssertionError):
    """An engine said or did something else than a test waits for."""


def environment() -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'api'}:{ROOT / 'runner_image'}", "OPENBLAS_NUM_THREADS": "1"}
    if OPENBLAS.exists():
        env["LD_PRELOAD"] = str(OPENBLAS)
    return env


@dataclass(slots=True)
class Answer:
    """What a request got."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: channel.Finished | None = None


class Rank:
    """One engine process, with the supervisor's end of its channel."""

    def __init__(self, rank: int, directory: Path, prefix: Sequence[str] = (), program: Sequence[str] = ENGINE) -> None:
        self.rank = rank
        page = directory / f"progress-{rank}"
        self.progress = Progress(page, create=True)
        self._ours, theirs = socket.socketpair()
        self.plan_file = directory / f"plan-{rank}.json"
        self._stderr = (directory / f"stderr-{rank}").open("wb+")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *program],
            env={
                **environment(),
                channel.FD_VARIABLE: str(theirs.fileno()),
                channel.PROGRESS_VARIABLE: str(page),
                "FAKE_ENGINE_PLAN": str(self.plan_file),
            },
            pass_fds=[theirs.fileno()],
            stdout=self._stderr,
            stderr=self._stderr,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.events: queue.Queue[channel.Event | None] = queue.Queue()
        self.seen: list[channel.Event] = []
        self.answers: dict[str, Answer] = {}
        self.started: channel.Started
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._ours.makefile("rb"):
                self.events.put(channel.decode_event(line))
        self.events.put(None)

    def send(self, *commands: channel.Command) -> None:
        """Together: the engine finds them all where it finds the first."""
        self._ours.sendall(b"".join(channel.encode(command) for command in commands))

    def next(self, seconds: float = SECONDS) -> channel.Event:
        """The next event, of whatever kind."""
        try:
            event = self.events.get(timeout=seconds)
        except queue.Empty:
            raise UnexpectedError(f"rank {self.rank}: nothing within {seconds} s; stderr: {self.stderr()}") from None
        if event is None:
            raise UnexpectedError(f"rank {self.rank} closed its channel, {self.seen[-1:]}; stderr: {self.stderr()}")
        self.seen.append(event)
        if isinstance(event, channel.Delta):
            answer = self.answers.setdefault(event.id, Answer())
            answer.tokens += event.tokens
            answer.text += event.text
        elif isinstance(event, channel.Finished):
            self.answers.setdefault(event.id, Answer()).finished = event
        return event

    def expect(self, kind: type[_E], seconds: float = SECONDS, where: Callable[[_E], bool] = lambda event: True) -> _E:
        """Read until an event of this kind comes; a failure of the engine on the way fails the test."""
        deadline = time.monotonic() + seconds
        while True:
            event = self.next(max(0.0, deadline - time.monotonic()))
            if isinstance(event, kind) and where(event):
                return event
            if isinstance(event, channel.Failure):
                raise UnexpectedError(f"rank {self.rank} failed: {event}; stderr: {self.stderr()}")

    def answer(self, request: str, seconds: float = SECONDS) -> Answer:
        """Wait for the end of a request."""
        known = self.answers.get(request)
        if known is None or known.finished is None:
            self.expect(channel.Finished, seconds, lambda event: event.id == request)
        return self.answers[request]

    def exit_code(self, seconds: float = 10.0) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()

    def hang_up(self) -> None:
        """What the engine sees when its supervisor dies."""
        self._ours.shutdown(socket.SHUT_RDWR)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stderr(self) -> str:
        self._stderr.flush()
        return Path(self._stderr.name).read_text(errors="replace")[-2000:]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        self._ours.close()
        self._stderr.close()
        self.progress.close()


def address(group: int, rank: int) -> str:
    """127.x.y.z: groups of one test run never meet, those of two at once hardly."""
    return f"127.{64 + os.getpid() % 190}.{group % 250}.{group // 250 * 8 + rank + 1}"


_groups = iter(range(1 << 12))


@dataclass(slots=True)
class Ranks:
    """Some engines that are to form a group."""

    directory: Path
    world_size: int
    sharding: Sharding = Sharding.PIPELINE
    epoch: int = 1
    group: int = field(default_factory=lambda: next(_groups) + (os.getpid() % 10) * 200)
    port: int = 8082
    ranks: list[Rank] = field(default_factory=list)
    hosts: Sequence[str] | None = None
    prefixes: Sequence[Sequence[str]] | None = None
    """Of each rank's command line: what puts it on a network of its own."""
    program: Sequence[str] = ENGINE

    def start(self) -> "Ranks":
        prefixes = self.prefixes or [()] * self.world_size
        self.ranks = [Rank(rank, self.directory, prefixes[rank], self.program) for rank in range(self.world_size)]
        for rank in self.ranks:
            rank.started = rank.expect(channel.Started)
        return self

    def __getitem__(self, rank: int) -> Rank:
        return self.ranks[rank]

    def host(self, rank: int) -> str:
        return self.hosts[rank] if self.hosts else address(self.group, rank)

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(Peer(rank=rank, pod_ip=self.host(rank), port=self.port) for rank in range(self.world_size))

    def connect_command(self, rank: int, **changes: Any) -> channel.Connect:
        command = channel.Connect(
            epoch=self.epoch,
            rank=rank,
            world_size=self.world_size,
            sharding=self.sharding,
            peers=self.peers,
            listen_host=self.host(rank),
            token=TOKEN,
            deadline=SECONDS,
        )
        return command.model_copy(update=changes)

    def connect(self) -> None:
        """As the operator does: with Tensor the last rank is told once all other ring ports listen."""
        if self.world_size == 1:
            return
        last = self.world_size - 1
        for rank in self.ranks[:last]:
            rank.send(self.connect_command(rank.rank))
        if self.sharding is Sharding.TENSOR:
            for rank in self.ranks[:last]:
                wait_listening(self.host(rank.rank), ring_port(self.epoch), rank.process.pid)
        self.ranks[last].send(self.connect_command(last))
        for rank in self.ranks:
            rank.expect(channel.Connected)

    def load_command(self, rank: int, model: Path, **changes: Any) -> channel.Load:
        command = channel.Load(
            path=str(model),
            served_name="tiny",
            rank=rank,
            world_size=self.world_size,
            sharding=self.sharding,
            max_concurrent_requests=8,
        )
        return command.model_copy(update=changes)

    def load(self, model: Path, **changes: Any) -> list[channel.Loaded]:
        for rank in self.ranks:
            rank.send(self.load_command(rank.rank, model, **changes))
        return [rank.expect(channel.Loaded) for rank in self.ranks]

    def warm_up(self, second_lane_rows: int | None = None) -> None:
        for rank in [*self.ranks[1:], self.ranks[0]]:
            rank.send(channel.Warmup(second_lane_rows=second_lane_rows))
        for rank in self.ranks:
            rank.expect(channel.WarmedUp)

    def serve(self, model: Path, **changes: Any) -> "Ranks":
        """Everything up to Ready."""
        self.connect()
        self.load(model, **changes)
        self.warm_up()
        return self

    def end(self) -> None:
        for rank in self.ranks:
            rank.end()


@contextlib.contextmanager
def running(
    directory: Path, world_size: int, sharding: Sharding = Sharding.PIPELINE, **options: Any
) -> Iterator[Ranks]:
    """Started engines; whatever is left of them is killed at the end."""
    ranks = Ranks(directory, world_size, sharding, **options)
    try:
        yield ranks.start()
    finally:
        ranks.end()


def wait_listening(host: str, port: int, pid: int, seconds: float = SECONDS) -> None:
    """Until a port listens in a process's network, read from the kernel: a connection would be taken for a peer."""
    wanted = f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"

    def listens() -> bool:
        rows = (line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
        return any(row[1] == wanted and row[3] == "0A" for row in rows)

    wait_until(listens, seconds, f"{host}:{port} listens")


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise UnexpectedError(f"not within {seconds} s: {what}")
        select.select([], [], [], 0.02)


def generate(request: str, tokens: Sequence[int], max_tokens: int, **options: Any) -> channel.Generate:
    return channel.Generate(
        id=request, prompt=tuple(tokens), max_tokens=max_tokens, temperature=options.pop("temperature", 0.0), **options
    )


def stop_process(rank: Rank) -> None:
    rank.process.send_signal(signal.SIGSTOP)


def continue_process(rank: Rank) -> None:
    rank.process.send_signal(signal.SIGCONT)
