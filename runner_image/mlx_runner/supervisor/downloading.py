"""DownloadModel: the download as a child process that can be killed."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from mlx_operator_api.conditions import Reason
from mlx_runner.download import result

from . import children, evidence

_KILL_SECONDS = 5.0

log = logging.getLogger(__name__)


async def download(
    source: str, mount: Path, memory: Path, *, seconds: float, on_percent: Callable[[int], None]
) -> result.Found | result.Refused:
    """Run the child to its result; it is killed and reaped at the deadline and when we are cancelled."""
    read_end, write_end = os.pipe()
    argv = [sys.executable, "-m", "mlx_runner.download", source, str(mount), str(memory)]
    try:
        child = children.spawn(argv, environment=os.environ, stdout=write_end, stderr=2)
    except OSError as error:
        os.close(read_end)
        return result.Refused(reason=Reason.MODEL_UNREACHABLE, message=f"the download cannot be started: {error}")
    finally:
        os.close(write_end)
    lines = asyncio.StreamReader()
    pipe = os.fdopen(read_end, "rb", buffering=0)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), pipe)
    percents: list[int] = [0]

    def tell(percent: int) -> None:
        percents.append(percent)
        on_percent(percent)

    try:
        async with asyncio.timeout(seconds):
            said = await _read(lines, tell)
            code = await child.wait()
    except TimeoutError:
        return result.Refused(
            reason=Reason.DOWNLOAD_TIMEOUT,
            message=f"the model was not verified within {seconds:g} s: {percents[-1]} % done",
        )
    finally:
        transport.close()
        child.kill()
        await _reaped(child)
    if said is not None:
        return said
    how = evidence.decode(code, 0, ()).what().replace("engine", "the download", 1)
    return result.Refused(reason=Reason.MODEL_UNREACHABLE, message=f"{how} without a result")


async def _reaped(child: children.Child) -> None:
    """A child that hangs in a dead network file system cannot be killed: the runner must not hang with it."""
    try:
        async with asyncio.timeout(_KILL_SECONDS):
            await child.wait()
    except TimeoutError:
        log.warning("the download pid=%d does not die: its file system hangs", child.pid)


async def _read(lines: asyncio.StreamReader, tell: Callable[[int], None]) -> result.Found | result.Refused | None:
    said: result.Found | result.Refused | None = None
    while line := await lines.readline():
        try:
            decoded = result.decode(line)
        except ValidationError as error:
            log.warning("the download said something undecodable: %s", str(error).replace("\n", " "))
            continue
        if isinstance(decoded, result.Percent):
            tell(decoded.percent)
        else:
            said = decoded
    return said
