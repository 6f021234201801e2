"""Waiting with a deadline, with a sign of life, and with the component's log in the error."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.cluster.errors import ClusterError

T = TypeVar("T")
Progress = Callable[[str], None]


def tell(text: str) -> None:
    """Write one progress line for the person at the terminal."""
    sys.stderr.write(f"[cluster] {text}\n")
    sys.stderr.flush()


def silent(text: str) -> None:
    """Drop a progress line (for tests)."""


def tail(path: Path | None, lines: int = 15) -> str:
    """Return the last lines of a log file, or a word on why there are none."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return f"(there is no log {path})"
    return "\n".join(text.splitlines()[-lines:]) or f"(the log {path} is empty)"


def wait_until(
    check: Callable[[], T | None],
    *,
    what: str,
    seconds: float,
    log: Path | None = None,
    progress: Progress = silent,
    interval: float = 0.03,
) -> T:
    """Call ``check`` until it returns something true, and return that.

    A line goes to ``progress`` every 5 s.

    Args:
        check: returns a false value for "not yet"; may raise ClusterError to give up at once.
        what: the awaited fact as a clause, such as "node n1 is Ready".
        seconds: the deadline.
        log: its last lines become part of the error.
        progress: receives a line every 5 s.
        interval: pause between two checks, in seconds.

    Raises:
        ClusterError: the deadline passed, or ``check`` gave up.
    """
    begun = time.monotonic()
    next_line = begun + 5
    while True:
        try:
            result = check()
        except ClusterError as error:
            raise ClusterError(f"Gave up waiting until {what}: {error}") from error
        if result:
            return result
        now = time.monotonic()
        if now - begun > seconds:
            raise ClusterError(f"Waited {seconds:.0f} s until {what}, in vain.{_end_of(log)}")
        if now >= next_line:
            progress(f"still waiting until {what} ({now - begun:.0f} of {seconds:.0f} s)")
            next_line = now + 5
        time.sleep(interval)


def ended(component: str, log: Path) -> ClusterError:
    """Return the error for a program that should run and does not, with the end of its log."""
    return ClusterError(f"{component} ended.{_end_of(log)}")


def _end_of(log: Path | None) -> str:
    return "" if log is None else f" The end of {log}:\n{tail(log)}"
