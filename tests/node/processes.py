"""Kills processes inside pods the way the world does: by pid, from the node."""

import os
import signal
from pathlib import Path
from typing import Any

from mlx_runner import channel
from tests.node.instance import Instance
from tests.node.kube import Object, wait_for

ENGINE = "mlx_runner.engine"


def pids(cluster: Any, instance: Instance, rank: int) -> dict[str, list[int]]:
    """Host pids in a rank's container: `engine` in use, `spare` beside it, and `supervisor` (PID 1 there)."""
    return pids_in(cluster, instance.pods()[rank])


def pids_in(cluster: Any, pod: Object) -> dict[str, list[int]]:
    """The same for a pod as the API server has it."""
    engines: list[int] = []
    supervisors: list[int] = []
    for pid, command in cluster.container_pids(pod["spec"]["nodeName"], pod["metadata"]["uid"]):
        if ENGINE in command:
            engines.append(pid)
        elif "mlx_runner" in command:
            supervisors.append(pid)
    names = {pid: name for pid in engines if (name := _name(pid)) is not None}
    # An engine takes its name with its first command; before that, none is in use and one at most may be there.
    used = [pid for pid, name in names.items() if name == channel.ENGINE_NAME] or list(names)
    # One that ended while the other names were read was never there beside the next one.
    used = [pid for pid in used if _name(pid) is not None]
    return {
        "engine": used,
        "spare": [pid for pid, name in names.items() if pid not in used and name != channel.ENGINE_NAME],
        "supervisor": supervisors,
    }


def _name(pid: int) -> str | None:
    """None: it has ended since it was listed."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None


def engine_pid(cluster: Any, instance: Instance, rank: int) -> int:
    """The one engine of a rank; two would be a failure of the product."""

    def one() -> int:
        engines = pids(cluster, instance, rank)["engine"]
        assert len(engines) <= 1, f"rank {rank} runs {len(engines)} engines"
        return engines[0] if engines else 0

    return int(wait_for(f"rank {rank} has an engine", one, 30))


def kill_engine(cluster: Any, instance: Instance, rank: int) -> None:
    """SIGKILL to the engine of a rank; its supervisor lives on."""
    os.kill(engine_pid(cluster, instance, rank), signal.SIGKILL)


def kill_container(cluster: Any, instance: Instance, rank: int) -> None:
    """PID 1 and the engine together: what an OOM kill does on cgroup v2."""
    found = pids(cluster, instance, rank)
    for pid in (*found["supervisor"], *found["engine"], *found["spare"]):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # the engine dies with its supervisor
