"""What the builders of binaries and images share: keys of inputs, a lock, long commands."""

import collections
import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from tests.cluster.errors import ClusterError

Progress = Callable[[str], None]

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
HEARTBEAT_SECONDS = 30.0
ATTEMPTS = 3
PAUSE_SECONDS = 5.0
"""Before another attempt to download."""
LOCK_DEADLINE_SECONDS = 3600.0
_LOCK_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0
_LINES_KEPT = 15


class BuildError(ClusterError):
    """A binary or an image cannot be built; the message is one sentence that ends in a remedy."""


def key_of(parts: Iterable[str | bytes]) -> str:
    """16 hex digits that name these inputs in this order; lengths count too: ("ab", "c") is not ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()[:16]


def key_of_files(root: pathlib.Path, files: Iterable[pathlib.Path]) -> str:
    """`key_of` the names (relative to root), execute bits and contents of files; times and owners do not count."""
    parts: list[str | bytes] = []
    for file in sorted(files):
        executable = "x" if file.stat().st_mode & 0o111 else "-"
        parts += [f"{executable} {file.relative_to(root).as_posix()}", file.read_bytes()]
    return key_of(parts)


def check_disk(place: pathlib.Path, needed_bytes: int, otherwise: str) -> None:
    """Refuses to start what would fill the disk.

    Args:
        place: a path on that disk; it need not exist yet.
        needed_bytes: what must be free.
        otherwise: what to do besides freeing space.

    Raises:
        BuildError: less is free.
    """
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise BuildError(
            f"{existing} has {free / 2**30:.1f} GiB free and this needs about {needed_bytes / 2**30:.0f}: "
            f"free some space, or {otherwise}"
        )


@contextlib.contextmanager
def locked(path: pathlib.Path, progress: Progress, deadline_seconds: float = LOCK_DEADLINE_SECONDS) -> Iterator[None]:
    """Holds an exclusive lock on a file, so that two processes never build the same thing at once.

    The kernel drops the lock when its holder dies, so a crash leaves nothing to clean up.

    Raises:
        BuildError: another process held the lock for `deadline_seconds`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with path.open("a+") as file:
        told = False
        while not _try_lock(file.fileno()):
            if not told:
                progress(f"another process is building ({_holder(path)}); waiting for it")
                told = True
            if time.monotonic() - started > deadline_seconds:
                raise BuildError(
                    f"{path} is still locked by another build ({_holder(path)}) after {deadline_seconds:.0f} s: "
                    "wait for that process to end, or stop it, and run this again"
                )
            time.sleep(_LOCK_POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: pathlib.Path) -> str:
    return path.read_text() or "process unknown"


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    what: str,
    progress: Progress,
    remedy: str,
    deadline_seconds: float,
    cwd: pathlib.Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Runs one long command to its end and returns what it wrote; says every 30 s that it is still at work.

    Raises:
        BuildError: the command is missing, fails, or is not done by the deadline (it is killed then); the message has
            its last lines and the remedy.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            # A process group of its own: what is left of it can be ended with it.
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise BuildError(f"{what} failed: the program {argv[0]} is not installed; {remedy}") from error
        try:
            in_time = _wait(process, what, progress, started + deadline_seconds)
        finally:
            _end(process)
        output.seek(0)
        text = output.read()
    if process.returncode != 0 or not in_time:
        why = f"exit code {process.returncode}" if in_time else f"ended at its deadline of {deadline_seconds:.0f} s"
        took = time.monotonic() - started
        raise BuildError(f"{what} failed after {took:.0f} s ({why}); {remedy}; its last lines:\n{_tail(text)}")
    return text


def persistently(step: Callable[[], str], progress: Progress, worth: re.Pattern[str] = re.compile("")) -> str:
    """Does a step that downloads, and again when it fails: a mirror that stumbles once must not end a whole set-up.

    Args:
        step: what is done, `ATTEMPTS` times at most.
        progress: told that it failed and is tried again.
        worth: only an error whose words match this is worth another attempt.

    Raises:
        BuildError: the last attempt failed, or one for a reason that another attempt would not change.
    """
    for attempt in range(2, ATTEMPTS + 1):
        try:
            return step()
        except BuildError as error:
            if not worth.search(str(error)):
                raise
            progress(f"{error}\ntrying again, attempt {attempt} of {ATTEMPTS}")
        time.sleep(PAUSE_SECONDS)
    return step()


def _wait(process: subprocess.Popen[bytes], what: str, progress: Progress, deadline: float) -> bool:
    """Waits for the end of a process, False if it did not come in time."""
    started = time.monotonic()
    while (left := deadline - time.monotonic()) > 0:
        try:
            process.wait(timeout=min(HEARTBEAT_SECONDS, left))
        except subprocess.TimeoutExpired:
            progress(f"{what}: still at work after {time.monotonic() - started:.0f} s")
        else:
            return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(text: str) -> str:
    lines = collections.deque((line for line in text.splitlines() if line.strip()), maxlen=_LINES_KEPT)
    return "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
