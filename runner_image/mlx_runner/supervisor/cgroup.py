"""What the container's cgroup says: memory limit, kills for memory, CPU quota. Versions 1 and 2."""

import os
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_V1_UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number near 2^63."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Where to look. A file that is missing is an answer too: nothing is known."""

    root: Path = _ROOT
    membership: Path = _MEMBERSHIP

    def memory_limit(self) -> int | None:
        """Bytes; None without a limit."""
        text = self._read("", "memory.max") or self._read("memory", "memory.limit_in_bytes")
        if text is None or not text.strip().isdecimal():
            return None
        limit = int(text)
        return limit if limit < _V1_UNLIMITED else None

    def oom_kills(self) -> int:
        """Processes of this cgroup that the kernel killed for memory since it exists."""
        text = self._read("", "memory.events") or self._read("memory", "memory.oom_control") or ""
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.strip().isdecimal():
                return int(value)
        return 0

    def cpus(self) -> int:
        """Whole CPUs that the quota allows, at least 1; without a quota those that the process may run on."""
        quota, period = self._quota()
        if quota > 0 and period > 0:
            return max(1, quota // period)
        return max(1, len(os.sched_getaffinity(0)))

    def _quota(self) -> tuple[int, int]:
        unified = (self._read("", "cpu.max") or "").split()
        if len(unified) == 2 and unified[0].isdecimal():
            return int(unified[0]), int(unified[1])
        quota, period = self._read("cpu", "cpu.cfs_quota_us"), self._read("cpu", "cpu.cfs_period_us")
        if quota is None or period is None:
            return 0, 0
        return int(quota), int(period)

    def _read(self, controller: str, name: str) -> str | None:
        # Inside a container the mount is the container's own cgroup; outside, the membership says which one is ours.
        places = [self.root / controller / self._path(controller) / name, self.root / controller / name]
        for place in places:
            try:
                return place.read_text()
            except OSError:
                continue
        return None

    def _path(self, controller: str) -> str:
        try:
            lines = self.membership.read_text().splitlines()
        except OSError:
            return ""
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path.lstrip("/")
        return ""
