"""A pod of the fake kubelet, its process, and the requests that a kubelet repeats."""

import asyncio
import json
import os
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlx_operator.act.kube import KubeError
from mlx_runner import channel

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "tests" / "runner" / "fake_engine.py"
PACKAGES = ("api", "operator", "runner_image", ".")
PROC = Path("/proc")
_ENDED = (FileNotFoundError, ProcessLookupError)


def python_path() -> str:
    """What a child process needs to import the project."""
    return os.pathsep.join(str(ROOT / package) for package in PACKAGES)


def write_model(folder: Path) -> None:
    """A model directory that passes verification and that no engine here reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 4}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


@dataclass
class Container:
    """The runner of one pod."""

    uid: str
    namespace: str
    name: str
    ip: str
    node: str
    manifest: dict[str, Any]
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0
    started: str = ""
    ended: dict[str, Any] | None = None
    ready: bool = False
    reason: str = ""
    """Why its process ended, where the kubelet knows more than an exit code: OOMKilled."""
    conditions: list[dict[str, Any]] = field(default_factory=list)
    """Of the pod, besides those that are always there."""
    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Status and time of its last change, by type of condition."""
    over: bool = False
    """The pod failed for good: nothing is reported of it any more."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


async def persist(request: Callable[[], Awaitable[Any]]) -> Any:
    """A kubelet repeats what the API server did not take, also over a long outage; None for what is gone."""
    for _ in range(3000):
        try:
            return await request()
        except KubeError as error:
            if not error.transient:
                return None
            await asyncio.sleep(0.1)
    raise AssertionError("the API server took nothing for 5 minutes")


def children_of(pid: int, proc: Path = PROC) -> list[int]:
    """The child processes of a process, the oldest first: by their start, since the numbers begin anew."""

    def found() -> Iterator[tuple[int, int]]:
        for task in (proc / str(pid) / "task").iterdir():
            with suppress(*_ENDED):  # a thread that has just ended; the others have children as well
                for child in (task / "children").read_text().split():
                    if (stat := _stat(int(child), proc)) is not None:
                        yield stat.started, int(child)

    try:
        return [child for _, child in sorted(found())]
    except _ENDED:
        return []


def is_engine(pid: int) -> bool:
    """Whether a process is an engine that a supervisor has begun to use, and is not dead."""
    stat = _stat(pid)
    return stat is not None and stat.name == channel.ENGINE_NAME and stat.state not in ("Z", "X")


class _Stat(NamedTuple):
    """Of `/proc/PID/stat`; the start is in ticks since the machine's."""

    name: str
    state: str
    started: int


def _stat(pid: int, proc: Path = PROC) -> _Stat | None:
    """None for a process that is gone."""
    try:
        name, _, rest = (proc / str(pid) / "stat").read_text().partition("(")[2].rpartition(")")
    except _ENDED:
        return None
    fields = rest.split()  # from the third on
    return _Stat(name, fields[0], int(fields[19]))


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
