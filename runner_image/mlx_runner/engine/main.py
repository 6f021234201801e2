"""The engine's process: a thread that reads commands, and the main thread that obeys them.

Connect → Load → serve, each once: an engine lives for one epoch at most. The main thread does all of MLX.
"""

import ctypes
import faulthandler
import os
import queue
import signal
import socket
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mlx_operator_api.conditions import Reason
from mlx_runner import channel
from mlx_runner.progress import Phase, Progress

from . import failures, imports
from .events import Events
from .failures import Ending

if TYPE_CHECKING:
    from .serving import Server

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_RING_GRACE_SECONDS = 0.5
"""MLX's error on a lost ring names nobody; the threads that watch the sockets name the rank within this time."""


class Engine:
    """State of the process: where it stands decides what an exception or a goodbye means."""

    def __init__(self, sock: socket.socket, progress: Progress) -> None:
        self._sock = sock
        self.progress = progress
        self.events = Events(sock)
        self.ending = Ending(self.events)
        self._commands: queue.SimpleQueue[channel.Connect | channel.Load] = queue.SimpleQueue()
        self._server: Server | None = None
        self._reason = Reason.ENGINE_CRASHED

    def start(self) -> None:
        """Read commands from now on."""
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def run(self) -> None:
        """Obey until a goodbye; never returns normally otherwise."""
        from . import serving  # which imports.import_all() has imported

        command = self._commands.get()
        _prctl(_PR_SET_NAME, channel.ENGINE_NAME.encode())
        group: serving.Formed | None = None
        if isinstance(command, channel.Connect):
            self._reason = Reason.CONNECT_FAILED
            group = serving.connect(command, self)
            self.events.send(channel.Connected())
            command = self._commands.get()
        if not isinstance(command, channel.Load):
            raise TypeError(f"{command.kind} after Connect")
        self._reason = Reason.LOAD_FAILED
        server = serving.load(command, group, self)
        self._server = server
        self._reason = Reason.WARMUP_FAILED
        self.events.send(server.loaded)
        server.run()

    def warmed_up(self, second_lane_rows: int | None = None) -> None:
        """The warm-up is done on this rank: from now on a failure is a crash."""
        self._reason = Reason.ENGINE_CRASHED
        self.events.send(channel.WarmedUp(second_lane_rows=second_lane_rows))

    def crash(self, error: BaseException) -> None:
        """Report an exception and end."""
        try:
            self._report(error)
        finally:
            # Whatever went wrong with the report itself: an engine that lives on would be waited for.
            os._exit(channel.FAILURE_EXIT_CODE)

    def _report(self, error: BaseException) -> None:
        if "[ring]" in str(error) and not self.ending.leaving:
            threading.Event().wait(_RING_GRACE_SECONDS)
        if self.ending.leaving:
            self.ending.leave()
        if not isinstance(error, failures.EngineError):
            traceback.print_exception(error)  # for the pod's log
        failure = failures.describe(error, self._reason)
        if "[ring]" in str(error) and failure.reason is not Reason.CONNECT_FAILED:
            failure = failure.model_copy(update={"reason": Reason.PEER_LOST})
        self.ending.fail(failure)

    def _read(self) -> None:
        buffered = self._sock.makefile("rb")
        for line in buffered:
            try:
                command = channel.decode_command(line)
            except ValidationError as error:
                text = str(error).replace("\n", " ")
                self.events.notice(f"command of the supervisor ignored: {text}", warning=True)
                self._refuse(line)
                continue
            self._route(command)
        # Nobody is left to report to.
        os._exit(channel.FAILURE_EXIT_CODE)

    def _refuse(self, line: bytes) -> None:
        """Whoever asks in a line that cannot be read is told: it would wait for ever, and keep its place."""
        asker = channel.asker(line)
        if asker is not None:
            message = "the engine could not read this request: its log says why"
            self.events.send(channel.Refused(id=asker, status=500, code=channel.INTERNAL_ERROR, message=message))

    def _route(self, command: channel.Command) -> None:
        match command:
            case channel.Connect() | channel.Load():
                self._commands.put(command)
            case channel.Goodbye() if self._server is None:
                self.ending.leave()
            case _ if self._server is not None:
                self._server.put(command)
            case _:
                self.events.notice(f"{command.kind} ignored: no model is loaded", warning=True)


def main() -> None:
    """Entry point. Ends by `os._exit` only: a destructor of MLX may hang when its group is broken."""
    faulthandler.enable()
    # No engine outlives its supervisor, also one that is too stuck to notice the closed channel.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_NAME, channel.SPARE_NAME.encode())
    engine = Engine(
        socket.socket(fileno=int(os.environ[channel.FD_VARIABLE])),
        Progress(Path(os.environ[channel.PROGRESS_VARIABLE])),
    )
    engine.progress.write(Phase.IDLE)
    # A thread that ended unseen would leave the others waiting for ever.
    threading.excepthook = lambda hook: engine.crash(hook.exc_value or RuntimeError(f"{hook.exc_type}"))
    try:
        if channel.BACKGROUND_VARIABLE in os.environ:
            imports.import_quietly()
        else:
            imports.import_all()
        engine.start()
        engine.events.send(channel.Started(pid=os.getpid(), device=imports.device(), blas=imports.blas()))
        engine.run()
    except BaseException as error:  # noqa: BLE001 (reported; the process ends)
        engine.crash(error)
    engine.ending.leave()


def _prctl(option: int, value: int | bytes) -> None:
    """prctl(2) with one argument, for the main thread."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
