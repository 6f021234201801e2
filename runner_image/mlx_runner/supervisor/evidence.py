"""What an ended engine leaves behind: how it exited, and the line of its stderr that says why."""

import re
import signal
from collections import deque
from dataclasses import dataclass

KEPT_LINES = 50
MAX_LINE = 1024
_STRONG = (
    re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit)\b(?::|$)"),
    re.compile(r"\bwhat\(\):"),
    re.compile(r"\bterminate called\b"),
    re.compile(r"^Fatal Python error\b"),
)
_WEAK = re.compile(r"\b(?:error|failed|cannot|can't|couldn't|no module named|abort(?:ed)?|segmentation fault)\b", re.I)


@dataclass(frozen=True, slots=True)
class Exit:
    """How an engine ended. `oom_kills`: by how many the cgroup's counter rose while it lived."""

    code: int | None
    signal: str | None
    signal_number: int | None
    oom_kills: int
    stderr: tuple[str, ...]
    killed_for: str | None = None
    """Why the supervisor itself killed it, as a clause: `it closed its channel`."""

    def what(self) -> str:
        """`engine killed by signal 9 (SIGKILL)` or `engine exited with code 3`."""
        if self.killed_for is not None:
            return f"engine killed by its supervisor because {self.killed_for}"
        if self.signal is not None:
            return f"engine killed by signal {self.signal_number} ({self.signal})"
        return f"engine exited with code {self.code}"


def decode(returncode: int, oom_kills: int, stderr: tuple[str, ...], killed_for: str | None = None) -> Exit:
    """From a return code as `subprocess` has it: negative for a signal."""
    if returncode >= 0:
        return Exit(returncode, None, None, oom_kills, stderr)
    number = -returncode
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"SIG{number}"
    return Exit(None, name, number, oom_kills, stderr, killed_for)


def kept_lines() -> "deque[str]":
    """A place for the last lines of a stderr."""
    return deque(maxlen=KEPT_LINES)


def meaningful(lines: tuple[str, ...]) -> str | None:
    """The first line that names an error; None rather than a guess where no line does.

    Of a Python traceback that is its last line (`RuntimeError: …`); of an abort what C++ said.
    """
    stripped = [line.strip() for line in lines]
    for pattern in (*_STRONG, _WEAK):
        for line in stripped:
            if pattern.search(line):
                return line[:MAX_LINE]
    return None
