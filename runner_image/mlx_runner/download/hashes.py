"""sha256 of files, computed once and remembered by size and modification time."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

_BLOCK = 4 * 1024 * 1024
MANIFEST = "SHA256SUMS"


def manifest(directory: Path) -> dict[str, str]:
    """Name → hash from the directory's `SHA256SUMS` (as `sha256sum` writes it); empty where there is none."""
    try:
        lines = (directory / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    pairs = (line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#"))
    return {pair[1].lstrip("*").removeprefix("./"): pair[0].lower() for pair in pairs if len(pair) == 2}


class Hashes:
    """The memory: a small JSON file. One that is lost or damaged only costs the time to hash again."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            known = json.loads(memory.read_text())
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, str] = known if isinstance(known, dict) else {}

    def sha256(self, path: Path, tell: Callable[[int], None]) -> str:
        """The hash of a file; `tell` hears the bytes read, block by block."""
        status = path.stat()
        key = f"{path}:{status.st_size}:{status.st_mtime_ns}"
        known = self._known.get(key)
        if known is not None:
            tell(status.st_size)
            return known
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                tell(len(block))
        self._known[key] = digest.hexdigest()
        self._save()
        return self._known[key]

    def _save(self) -> None:
        fresh = self._memory.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(self._known))
            os.replace(fresh, self._memory)
        except OSError:
            fresh.unlink(missing_ok=True)
