"""DownloadModel: the download as a child process that can be killed."""

import asyncio
import logging
import os
import sys
from typing import Protocol

from pydantic import ValidationError

from mlx_operator_api.conditions import Reason
from mlx_operator_api.tasks import ModelFacts
from mlx_runner.download import result
from mlx_runner.download.request import Request

from . import children, evidence

_KILL_SECONDS = 5.0
_MAX_LINE = 1024 * 1024
_LASTING = 3
"""So many troubles without progress between them are worth telling in the report."""
ENVIRONMENT = {
    # The image keeps the engine offline.
    "HF_HUB_OFFLINE": "0",
    "TRANSFORMERS_OFFLINE": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # Its transfers are not bounded by the timeouts that ours are.
    "HF_HUB_DISABLE_XET": "1",
}
_PATIENCE = "HF_HUB_DOWNLOAD_TIMEOUT"
_PATIENCE_SECONDS = "30"
"""Without a byte for so long a transfer counts as stalled; the user's word, in whole seconds, goes first."""

log = logging.getLogger(__name__)


class Tell(Protocol):
    """Hears facts for the report, while they come."""

    def __call__(self, **facts: object) -> None:
        """Fields of `RunnerReport`."""


async def download(request: Request, *, seconds: float, tell: Tell) -> result.Found | result.Refused:
    """Run the child to its result; it is killed and reaped at the deadline and when we are cancelled."""
    read_end, write_end = os.pipe()
    argv = [sys.executable, "-m", "mlx_runner.download", request.model_dump_json(by_alias=True)]
    environment = {**os.environ, **ENVIRONMENT, _PATIENCE: _patience()}
    try:
        child = children.spawn(argv, environment=environment, stdout=write_end, stderr=2)
    except OSError as error:
        os.close(read_end)
        return result.Refused(reason=Reason.MODEL_UNREACHABLE, message=f"the download cannot be started: {error}")
    finally:
        os.close(write_end)
    lines = asyncio.StreamReader(limit=_MAX_LINE)
    pipe = os.fdopen(read_end, "rb", buffering=0)
    listener, protocol = _Listener(tell), asyncio.StreamReaderProtocol(lines)
    transport: asyncio.ReadTransport | None = None
    try:
        async with asyncio.timeout(seconds):
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
            said = await listener.read(lines)
            code = await child.wait()
    except TimeoutError:
        return listener.late(seconds)
    finally:
        if transport is not None:
            transport.close()
        # Whenever we are cancelled, from its start on: one that lived on would keep its locks from the next.
        child.kill()
        await _reaped(child)
    if said is not None:
        return said
    how = evidence.decode(code, 0, ()).what().replace("engine", "the download", 1)
    return result.Refused(reason=Reason.MODEL_UNREACHABLE, message=f"{how} without a result")


def _patience() -> str:
    text = os.environ.get(_PATIENCE, _PATIENCE_SECONDS)
    if text.isdecimal() and int(text) > 0:
        return text
    log.warning("%s=%r is no number of seconds: %s is taken", _PATIENCE, text, _PATIENCE_SECONDS)
    return _PATIENCE_SECONDS


async def _reaped(child: children.Child) -> None:
    """A child that hangs in a dead network file system cannot be killed: the runner must not hang with it."""
    try:
        async with asyncio.timeout(_KILL_SECONDS):
            await child.wait()
    except TimeoutError:
        log.warning("the download pid=%d does not die: its file system hangs", child.pid)


class _Listener:
    """What the child says, for the report and for the log."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._percent = 0
        self._troubles = 0
        self._trouble: str | None = None
        """The last one, until something was achieved."""

    async def read(self, lines: asyncio.StreamReader) -> result.Found | result.Refused | None:
        """To the end; the result, if there was one."""
        said: result.Found | result.Refused | None = None
        while line := await lines.readline():
            try:
                decoded = result.decode(line)
            except ValidationError as error:
                log.warning("the download said something undecodable: %s", str(error).replace("\n", " "))
                continue
            match decoded:
                case result.Percent():
                    self._progress(decoded)
                case result.Resolved():
                    log.info("model revision %s, adapter revision %s", decoded.revision, decoded.adapter_revision)
                    known = ModelFacts(revision=decoded.revision, adapter_revision=decoded.adapter_revision)
                    self._tell(model=known)
                case result.Trouble():
                    self._note(decoded)
                case _:
                    said = decoded
        return said

    def _progress(self, now: result.Percent) -> None:
        self._trouble = None if now.percent > self._percent else self._trouble
        # A trouble that was told stays for a step of progress, so that a shaky network does not flood the status.
        moved = now.percent // 10 > self._percent // 10
        self._troubles = 0 if moved or self._troubles < _LASTING else self._troubles
        self._percent = now.percent
        self._tell(
            download_percent=now.percent, download_bytes=now.total, **({"download_trouble": None} if moved else {})
        )

    def _note(self, trouble: result.Trouble) -> None:
        again = f"; again in {trouble.seconds:.1f} s" if trouble.seconds else ""
        log.warning("download: %s%s", trouble.what, again)
        self._trouble = trouble.what
        self._troubles += 1
        if self._troubles >= _LASTING:
            self._tell(download_trouble=trouble.what)

    def late(self, seconds: float) -> result.Refused:
        """The deadline is over: whose fault it is, as far as can be told."""
        words = f"the model was not present and verified within {seconds:g} s: {self._percent} % done"
        if self._trouble is None:
            return result.Refused(reason=Reason.DOWNLOAD_TIMEOUT, message=words)
        return result.Refused(reason=Reason.MODEL_UNREACHABLE, message=f"{words}; last: {self._trouble}")
