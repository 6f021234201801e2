"""The grammar of messages: who, what, evidence, next step; one line, at most 1024 characters."""

import re
import signal
from collections.abc import Iterable
from datetime import datetime

from mlx_operator_api.base import format_time
from mlx_operator_api.conditions import Reason
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


MODEL_IMAGE_REMEDY = "correct spec.model.source or imagePullSecrets, or make the registry reachable"
"""What to do about ImagePullFailed when the image is the model's."""

ADAPTER_REMEDY = (
    "correct spec.model.adapter.source: it must lead to a directory with adapter_config.json and adapters.safetensors"
)
"""What to do about ModelNotFound when it is the adapter that was not found."""


def split_advice(message: str, reason: Reason, pods: Iterable[str]) -> tuple[str, str]:
    """A message without its next step, and that step."""
    for advice in (*(remedy(reason, pod) for pod in pods), reason.remedy, MODEL_IMAGE_REMEDY, ADAPTER_REMEDY):
        if advice and message.endswith("; " + advice):
            return message.removesuffix("; " + advice), advice
    return message, reason.remedy


def remedy(reason: Reason, pod: str | None) -> str:
    """What to do, with the pod's name in the commands."""
    return reason.remedy if pod is None else re.sub(r"\bPOD\b", pod, reason.remedy)


def count(number: int, noun: str) -> str:
    """`1 pod`, `2 pods`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
