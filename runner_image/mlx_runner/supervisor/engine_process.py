"""One engine: a child that holds MLX, peers and weights. It may freeze, abort or be killed at any time."""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from mlx_runner import channel
from mlx_runner.progress import Progress, Snapshot

from . import children, evidence
from .cgroup import Cgroup
from .config import Config

log = logging.getLogger(__name__)

_SETTLE_SECONDS = 1.0
"""After the end of the process: for what is still in its pipes (a grandchild may hold them open for ever)."""
_ENGINE_LINE = "engine: "
_MAX_LINE_BYTES = 1024 * 1024
"""Of its output."""
_FIRST_TO_DIE = 1000
"""oom_score_adj: where memory is short, the kernel takes this process before any other of the container."""


class EngineProcess:
    """A running engine. `on_event` and `on_exit` are called in the order of what happened, exit last and once."""

    def __init__(self, child: children.Child, progress: Progress, cgroup: Cgroup) -> None:
        self.pid = child.pid
        self.started = False
        self.bare_bytes = 0
        """Resident memory of the engine with its imports done and nothing loaded; 0: not started yet."""
        self.reserved_bytes = 0
        """What the sum of its memory leaves of the limit for a spare beside it."""
        self.on_event: Callable[[channel.Event], None] = lambda event: None
        self.on_exit: Callable[[evidence.Exit], None] = lambda exit_: None
        self._child = child
        self._progress = progress
        self._last = progress.read()
        self._cgroup = cgroup
        self._oom_before = cgroup.oom_kills()
        self._stderr = evidence.kept_lines()
        self._killed_for: str | None = None
        self._commands: asyncio.WriteTransport | None = None
        self._exit: asyncio.Future[evidence.Exit] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether its end was not yet told."""
        return not self._exit.done()

    @property
    def progress(self) -> Snapshot:
        """What it last wrote to shared memory."""
        if self.alive:
            self._last = self._progress.read()
        return self._last

    def send(self, command: channel.Command) -> None:
        """Give it a command. Never blocks; a command to an ended engine is dropped, its end is told anyway."""
        if self._commands is not None and not self._commands.is_closing():
            self._commands.write(channel.encode(command))

    def kill(self) -> None:
        """SIGKILL, whatever it does."""
        self._child.kill()

    # -- a spare
    def offer_to_oom_killer(self) -> None:
        """It stands by and is the one that the pod can spare."""
        self._write_oom_score(_FIRST_TO_DIE)

    def adopt(self) -> None:
        """An epoch uses it from now on: what happened in the cgroup before is not its story."""
        self._oom_before = self._cgroup.oom_kills()
        with suppress(OSError):
            # Allowed without privileges: down to what the container was given, never below.
            self._write_oom_score(int(Path("/proc/self/oom_score_adj").read_text()))

    def forgive(self, oom_kills: int) -> None:
        """So many kills in this cgroup since its start hit another process."""
        self._oom_before += oom_kills

    def _write_oom_score(self, score: int) -> None:
        try:
            Path(f"/proc/{self.pid}/oom_score_adj").write_text(str(score))
        except OSError as error:
            log.debug("oom_score_adj of engine pid=%d stays as it is: %s", self.pid, error)

    async def wait(self) -> evidence.Exit:
        """Its exit, once it was reaped and its last words were read."""
        return await asyncio.shield(self._exit)

    def run(self, commands: asyncio.WriteTransport, events: "_Pipe", stderr: "_Pipe") -> None:
        """Start to read from it."""
        self._commands = commands
        self._task = asyncio.create_task(self._supervise(events, stderr), name=f"engine-{self.pid}")
        self._task.add_done_callback(_log_bug)

    async def _supervise(self, events: "_Pipe", stderr: "_Pipe") -> None:
        readers = [
            asyncio.create_task(self._read_events(events.reader)),
            asyncio.create_task(self._read_stderr(stderr.reader)),
        ]
        readers[0].add_done_callback(self._deaf)
        code = await self._child.wait()
        _, late = await asyncio.wait(readers, timeout=_SETTLE_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for end in (events.transport, stderr.transport, self._commands):
            if end is not None:
                end.close()
        self._last = self._progress.read()
        self._progress.close()
        oom_kills = self._cgroup.oom_kills() - self._oom_before
        exit_ = evidence.decode(code, oom_kills, tuple(self._stderr), self._killed_for)
        log.info("%s pid=%d", exit_.what(), self.pid)
        self._exit.set_result(exit_)
        self.on_exit(exit_)

    async def _read_events(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._tell(line)
        except ConnectionError:
            log.debug("channel of engine pid=%d reset", self.pid)
        except ValueError:
            self._abandon(f"it sent a line longer than {channel.MAX_EVENT_BYTES} bytes")
        # Its end of the channel is closed: it is ending, or it cannot be talked to any more.
        asyncio.get_running_loop().call_later(_SETTLE_SECONDS, self._abandon, "it closed its channel")

    def _deaf(self, reading: "asyncio.Task[None]") -> None:
        """A bug of ours in what an event sets off: an engine that nobody listens to must not live on."""
        _log_bug(reading)
        if not reading.cancelled() and reading.exception() is not None:
            self._abandon("its supervisor could not handle what it said")

    def _abandon(self, why: str) -> None:
        if self._child.alive:
            self._killed_for = why
            self.kill()

    def _tell(self, line: bytes) -> None:
        try:
            event = channel.decode_event(line)
        except ValidationError as error:
            log.warning("engine pid=%d sent something undecodable: %s", self.pid, str(error).replace("\n", " "))
            return
        if isinstance(event, channel.Started):
            self.started = True
            self.bare_bytes = _resident_bytes(self.pid)
            log.info("engine started pid=%d device=%s blas=%s", self.pid, event.device, event.blas)
        elif isinstance(event, channel.Notice):
            log.log(logging.WARNING if event.level == "warning" else logging.INFO, "engine: %s", event.text)
        self.on_event(event)

    async def _read_stderr(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # longer than the stream's limit: that part is dropped
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._stderr.append(text)
            sys.stderr.write(f"{_ENGINE_LINE}{text}\n")


def _log_bug(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a bug in the supervisor: %s", error, exc_info=error)


async def spawn(config: Config, cgroup: Cgroup, *, background: bool = False) -> EngineProcess:
    """Start an engine; in the `background` of one that serves.

    Raises:
        OSError: it cannot be started.
    """
    with ExitStack() as on_error, ExitStack() as theirs:
        # In memory: no full or read-only volume keeps an engine from its start.
        page = os.memfd_create("progress")
        theirs.callback(os.close, page)
        path = Path(f"/proc/self/fd/{page}")
        progress = Progress(path, create=True)
        on_error.callback(progress.close)
        our_end, their_end = socket.socketpair()
        on_error.callback(our_end.close)
        theirs.callback(their_end.close)
        read_end, write_end = os.pipe()
        on_error.callback(os.close, read_end)
        theirs.callback(os.close, write_end)
        environment = dict(engine_environment(config, cgroup, path, their_end.fileno()))
        if background:
            environment[channel.BACKGROUND_VARIABLE] = "1"
        child = children.spawn(
            config.engine_argv,
            environment=environment,
            stdout=write_end,
            stderr=write_end,
            pass_fds=[their_end.fileno(), page],
        )
        on_error.pop_all()
    engine = EngineProcess(child, progress, cgroup)
    commands = await _write_commands(our_end.dup())
    engine.run(commands, await _read_socket(our_end, channel.MAX_EVENT_BYTES), await _read_pipe(read_end))
    return engine


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def engine_environment(config: Config, cgroup: Cgroup, page: Path, fd: int) -> Mapping[str, str]:
    """Environment of the engine: ours, its ends of channel and progress page, and BLAS.

    OpenBLAS counts the host's cores, not the quota: without its variable it would start dozens of threads for one CPU.
    """
    environment = {
        **os.environ,
        channel.FD_VARIABLE: str(fd),
        channel.PROGRESS_VARIABLE: str(page),
    }
    environment.setdefault("OPENBLAS_NUM_THREADS", str(cgroup.cpus()))
    if config.blas is not None and config.blas.exists():
        others = environment.get("LD_PRELOAD")
        environment["LD_PRELOAD"] = f"{config.blas}:{others}" if others else str(config.blas)
    return environment


@dataclass(frozen=True)
class _Pipe:
    """Where an engine is heard."""

    reader: asyncio.StreamReader
    transport: asyncio.BaseTransport


async def _read_pipe(fd: int) -> _Pipe:
    reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    pipe = os.fdopen(fd, "rb", buffering=0)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return _Pipe(reader, transport)


async def _read_socket(sock: socket.socket, limit: int) -> _Pipe:
    """Unlike that of a pipe, asyncio's transport of a socket takes a reset as an end and no error for the log."""
    reader = asyncio.StreamReader(limit=limit)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_unix_connection(lambda: asyncio.StreamReaderProtocol(reader), sock=sock)
    return _Pipe(reader, transport)


class _WriteOnly(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.ReadTransport", transport).pause_reading()


async def _write_commands(sock: socket.socket) -> asyncio.WriteTransport:
    """Our end of the channel once more, for writing alone.

    asyncio reads no more from a transport that it could not write to: the last words of an engine that ended while a
    command was on its way would be lost.
    """
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_unix_connection(_WriteOnly, sock=sock)
    return transport
