"""Start background programs and stop exactly those again, whatever crashed in between.

A program is recorded by process id, start time and boot id. The record is written by the child itself before it
becomes the program, so there is no instant at which a cluster runs an unrecorded program; and because the start time
is part of it, an id that the kernel has given to somebody else since is never signalled.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.waiting import ended, wait_until

# The child joins its cgroup, records itself under its own id, then becomes the program. Field 22 of /proc/ID/stat is
# the start time (proc(5)); the second field is "(sh)" here, so that plain field counting is right.
_LAUNCH = """
record=$1 cgroup=$2; shift 2
[ -z "$cgroup" ] || echo $$ > "$cgroup/cgroup.procs" || exit 120
started=$(cut -d' ' -f22 /proc/$$/stat); read -r boot < /proc/sys/kernel/random/boot_id
echo "$$ $started $boot" > "$record.new" && mv "$record.new" "$record" && exec "$@"
"""


@dataclass(frozen=True)
class Record:
    """One started program: process id, start time in clock ticks after boot, and which boot that was."""

    pid: int
    started: int
    boot_id: str

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """Return the record stored at ``path``, or None when there is none (or only half of one)."""
        try:
            pid, started, boot_id = path.read_text().split()
            return cls(int(pid), int(started), boot_id)
        except (FileNotFoundError, ValueError):
            return None

    @classmethod
    def of(cls, pid: int) -> "Record | None":
        """Return the record of a running process, or None when it has ended."""
        stat = _stat(pid)
        return None if stat is None else cls(pid, stat[1], _boot_id())

    def write(self, path: Path) -> None:
        """Store the record at ``path``."""
        path.write_text(f"{self.pid} {self.started} {self.boot_id}\n")

    def alive(self) -> bool:
        """Whether the recorded process, and not another one of the same id, still runs."""
        stat = _stat(self.pid)
        if stat is None or stat[1] != self.started or self.boot_id != _boot_id():
            return False
        # The first thread of a killed program ends before the others do, and they still hold its sockets.
        if stat[0] not in "ZX" or stat[2] > 1:
            return True
        self._reap()
        return False

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to the recorded process; False when it has ended.

        The process is pinned by a pidfd first and compared afterwards, so the id cannot change hands in between.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True

    def stop(self, *, grace: float = 5.0) -> None:
        """End the process: SIGTERM, after ``grace`` seconds SIGKILL; returns when it is gone.

        Raises:
            ClusterError: it still runs 10 s after SIGKILL.
        """
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
            if seconds and not self.send(number):
                return
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if not self.alive():
                    return
                time.sleep(0.01)
        raise ClusterError(f"Process {self.pid} does not end after SIGKILL; look at /proc/{self.pid}/stack.")

    def _reap(self) -> None:
        # Only children of this very process can be waited for; init does it for all others.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


def spawn(
    argv: Sequence[str | Path],
    *,
    record: Path,
    log: Path,
    cgroup: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Record:
    """Start a program in the background, in a session of its own, and return its record.

    Args:
        argv: the program and its arguments.
        record: where the record goes; an old one is overwritten.
        log: standard output and error are appended here.
        cgroup: folder of the cgroup that the program and all its children belong to.
        env: the whole environment; this process's one if None.

    Raises:
        ClusterError: it could not be started; the message ends with its log.
    """
    for folder in (record.parent, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    shell = shutil.which("sh") or "/bin/sh"
    arguments = [shell, "-c", _LAUNCH, "launch", str(record), str(cgroup or ""), *map(str, argv)]
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(shell, arguments, dict(env or environment()), file_actions=actions, setsid=True)
    started = Record.of(pid)

    def recorded() -> Record | None:
        if started is None or not started.alive():
            raise ended(record.name, log)
        return Record.read(record)

    return wait_until(recorded, what=f"{record.name} is started", seconds=20, log=log)


def environment() -> dict[str, str]:
    """Return this process's environment, with the system's folders at the end of PATH: a plain `su` leaves them out."""
    path = os.environ.get("PATH", "")
    return {**os.environ, "PATH": f"{path}:/usr/sbin:/usr/bin:/sbin:/bin"}


def command_line(pid: int) -> str:
    """Return the arguments of a process joined by blanks, empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stat(pid: int) -> tuple[str, int, int] | None:
    """Return (state, start time, number of threads) of a process."""
    try:
        # The name in parentheses may hold blanks: count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19]), int(fields[17])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
