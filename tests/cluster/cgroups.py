"""The cgroup trees of a cluster: ``/mlxop-NAME/hub`` for the control plane, ``/mlxop-NAME/NODE`` for each node.

Every program of a node, its shims and its containers live below the node's cgroup, so that "everything of this node" is
a question the kernel answers. Written for cgroup v1 (one tree per controller), where it is tested; on v2 there is one
tree, `cgroup.kill` and `cgroup.freeze`, and that path was never run.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.waiting import wait_until

ROOT = Path("/sys/fs/cgroup")
_NEEDED_V1 = ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "pids")
_CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")


def is_v2() -> bool:
    """Whether the unified hierarchy alone is mounted."""
    return (ROOT / "cgroup.controllers").exists()


def missing_controllers() -> list[str]:
    """Return the cgroup v1 controllers that a kubelet needs and this machine does not mount (none on v2)."""
    return [] if is_v2() else [name for name in _NEEDED_V1 if not (ROOT / name).is_dir()]


class Group:
    """One cgroup, in every hierarchy of the machine.

    Args:
        name: path below each hierarchy, such as ``mlxop-default/n1``.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def ensure(self) -> None:
        """Make the group in every hierarchy; on v1 a cpuset takes its parent's CPUs, or nothing could run in it."""
        for hierarchy in _hierarchies():
            folder = hierarchy
            for part in self.name.split("/"):
                parent, folder = folder, folder / part
                folder.mkdir(exist_ok=True)
                for file in _CPUSET_FILES:
                    if not is_v2() and (folder / file).exists() and not (folder / file).read_text().strip():
                        (folder / file).write_text((parent / file).read_text())

    @property
    def tracker(self) -> Path:
        """The group's folder in the one hierarchy that all its programs join when they start."""
        return ROOT / self.name if is_v2() else ROOT / "freezer" / self.name

    def folder(self, controller: str) -> Path:
        """The group's folder in the hierarchy of a v1 controller."""
        return ROOT / self.name if is_v2() else ROOT / controller / self.name

    def pids(self) -> list[int]:
        """Return the ids of all processes in the group and below it."""
        return sorted({pid for folder in _tree(self.tracker) for pid in _pids(folder)})

    def exists(self) -> bool:
        """Whether a folder of the group is left in any hierarchy."""
        return any((hierarchy / self.name).exists() for hierarchy in _hierarchies())

    def kill(self) -> None:
        """End every process of the group at once, as a power loss would.

        The group is frozen first: nothing can fork or react in between, and a frozen id cannot be reused.

        Raises:
            ClusterError: processes are left after 15 s, with their ids.
        """
        if not self.tracker.exists():
            return
        if is_v2():
            (self.tracker / "cgroup.kill").write_text("1")
        else:
            self._kill_frozen()
        wait_until(self._emptied, what=f"the processes of {self.name} are gone", seconds=15, interval=0.01)

    def _kill_frozen(self) -> None:
        state = self.tracker / "freezer.state"
        state.write_text("FROZEN")
        deadline = time.monotonic() + 3
        # A process in an uninterruptible wait may keep the group at FREEZING; it is killed all the same.
        while state.read_text().strip() != "FROZEN" and time.monotonic() < deadline:
            time.sleep(0.005)
        try:
            _kill(self.pids())
        finally:
            state.write_text("THAWED")

    def _emptied(self) -> bool:
        pids = self.pids()
        _kill(pids)
        return not pids

    def remove(self, *, keep_top: bool = False) -> None:
        """Remove the group's folders in every hierarchy, deepest first; what is in them by now is killed.

        A program that was being started during `kill` joins its group afterwards.

        Args:
            keep_top: keep the group itself, and only remove what is below it.

        Raises:
            ClusterError: the kernel still holds one after 10 s.
        """
        for hierarchy in _hierarchies():
            top = hierarchy / self.name

            def gone(top: Path = top) -> bool:
                folders = [folder for folder in _tree(top) if not (keep_top and folder == top)]
                for folder in folders:
                    _kill(_pids(folder))
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                return not any(folder.exists() for folder in folders)

            wait_until(gone, what=f"the cgroup {top} can be removed", seconds=10)


def pod_folders(group: Group, pod_uid: str, controller: str) -> Iterator[Path]:
    """Yield the cgroup folders of a pod (one, wherever its quality-of-service class puts it)."""
    for folder in _tree(group.folder(controller) / "kubepods"):
        if folder.name == f"pod{pod_uid}":
            yield folder


def container_pids(group: Group, pod_uid: str) -> dict[str, list[int]]:
    """Return {container id: process ids} of a pod, its sandbox included; empty when the pod is not on the node."""
    found: dict[str, list[int]] = {}
    for pod in pod_folders(group, pod_uid, "freezer"):
        for folder in _tree(pod):
            if folder != pod and folder.parent == pod:
                found[folder.name] = sorted({pid for below in _tree(folder) for pid in _pids(below)})
    return found


def cpu_seconds(group: Group, pod_uid: str) -> float:
    """Return the CPU time that a pod has used since it was created.

    Raises:
        ClusterError: the pod has no cgroup on this node.
    """
    for folder in pod_folders(group, pod_uid, "cpuacct"):
        if is_v2():
            values = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            return int(values["usage_usec"]) / 1e6
        return int((folder / "cpuacct.usage").read_text()) / 1e9
    raise ClusterError(f"Pod uid {pod_uid} has no cgroup below {group.name}: it does not run on that node.")


def _hierarchies() -> list[Path]:
    if is_v2():
        return [ROOT]
    return [folder for folder in sorted(ROOT.iterdir()) if folder.is_dir() and not folder.is_symlink()]


def _tree(top: Path) -> list[Path]:
    """Return the folder and all below it, deepest first; empty when it is not there."""
    return [Path(path) for path, _, _ in os.walk(top, topdown=False)]


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        # Children of this very process stay zombies, and members, until they are waited for.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _pids(folder: Path) -> list[int]:
    try:
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    except (FileNotFoundError, OSError):
        return []
