"""The grammar of messages: who, what, evidence, next step; one line, at most 1024 characters."""

import re
import signal
from datetime import datetime

from mlx_operator_api.base import format_time
from mlx_operator_api.status import MAX_MESSAGE

_ERROR = re.compile(r"error|exception|fatal|panic|cannot|failed|denied|no such", re.IGNORECASE)
MAX_EVIDENCE = 400


def one_line(text: str, limit: int = MAX_MESSAGE) -> str:
    """Collapse white space and cut at the end."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def clauses(*parts: str) -> str:
    """Join the clauses of a message; empty ones are left out."""
    return one_line("; ".join(part.strip().rstrip(";.") for part in parts if part.strip()))


def listed(*parts: str) -> str:
    """Join what belongs to one clause."""
    return ", ".join(part for part in parts if part)


def clock_time(time: datetime) -> str:
    """`15:00:08Z`: absolute, so that a message does not change while it waits."""
    return format_time(time)[11:]


def signal_name(number: int) -> str:
    """Name of a signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def evidence_line(log: str) -> str:
    """The last line of a log's tail that says what went wrong (where a traceback ends); else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    chosen = next((line for line in reversed(lines) if _ERROR.search(line)), lines[-1] if lines else "")
    return one_line(chosen, MAX_EVIDENCE)


def without_who(message: str) -> str:
    """What follows `rank 1/2 pod tiny-1 on node n2: `."""
    head, separator, rest = message.partition(": ")
    return rest if separator and head.startswith("rank ") else message


def count(number: int, noun: str) -> str:
    """`1 pod`, `2 pods`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
