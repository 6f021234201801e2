"""Child processes: waited for without threads, and orphans reaped, because the supervisor is PID 1 of its pod."""

import asyncio
import logging
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

log = logging.getLogger(__name__)

_owned: set[int] = set()
"""Children that somebody waits for; the reaper of orphans leaves them alone."""


class Child:
    """One child process, in a session of its own. `wait` may be called by many, and again after the end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid
        # A pidfd is readable once the process has ended: no thread, no race with other users of SIGCHLD.
        self._pidfd = os.pidfd_open(process.pid)
        _owned.add(self.pid)
        loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = loop.create_future()
        loop.add_reader(self._pidfd, self._ended)

    @property
    def alive(self) -> bool:
        """Whether it was not yet reaped."""
        return not self._exit.done()

    async def wait(self) -> int:
        """The exit code, negative for a signal, once it has ended and was reaped."""
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        """SIGKILL to it and to what it started; nothing if it has ended."""
        if not self.alive:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _ended(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # Before the reaping, which frees the process group's number: what the child had started ends with it.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        _owned.discard(self.pid)
        if not self._exit.done():
            self._exit.set_result(code)


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    stdout: int,
    stderr: int,
    pass_fds: Sequence[int] = (),
) -> Child:
    """Start a child.

    Raises:
        OSError: it cannot be started (no such program, no memory, no process id or file descriptor left).
    """
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=dict(environment),
        pass_fds=pass_fds,
        start_new_session=True,
    )
    try:
        return Child(process)
    except OSError:  # no descriptor left for the pidfd: a child that nobody can wait for must not live
        process.kill()
        process.wait()
        raise


def reap_orphans() -> None:
    """Reap children that nobody waits for: what a dead child left behind comes to PID 1. Call it on SIGCHLD."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in _owned:
            # An owned one is reaped through its pidfd within this turn of the loop; its end calls us again.
            return
        os.waitpid(ended.si_pid, os.WNOHANG)
        log.info("reaped orphan pid=%d", ended.si_pid)


def watch_orphans(loop: asyncio.AbstractEventLoop) -> None:
    """Reap orphans from now on. Only for the main thread of PID 1: SIGCHLD belongs to one."""

    def on_child() -> None:
        reap_orphans()
        # Behind an owned child an orphan may wait: look again once that one was reaped.
        loop.call_later(1.0, reap_orphans)

    loop.add_signal_handler(signal.SIGCHLD, on_child)
