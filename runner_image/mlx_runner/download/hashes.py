"""sha256 of files, computed once and remembered by size and modification time."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from . import files

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
        self._known = self._read()

    def sha256(self, path: Path, tell: Callable[[int], None]) -> str:
        """The hash of a file; `tell` hears the bytes read, block by block."""
        size, key = path.stat().st_size, _key(path)
        known = self._known.get(key)
        if known is not None:
            tell(size)
            return known
        found = sha256(path, tell)
        self._keep(key, found)
        return found

    def remember(self, path: Path, found: str) -> None:
        """The hash of a file that was just computed under another name."""
        self._keep(_key(path), found)

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._memory.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _keep(self, key: str, found: str) -> None:
        # Others may have written since: what they know is kept, but for what is written at this very moment.
        self._known = {**self._read(), **self._known, key: found}
        try:
            files.write(self._memory, json.dumps(self._known))
        except OSError:
            return


def _key(path: Path) -> str:
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"


def sha256(path: Path, tell: Callable[[int], None]) -> str:
    """Read a file; `tell` hears the bytes read, block by block."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        tell(len(block))
    return digest.hexdigest()


def git_blob(path: Path) -> str:
    """The name that git gives to a file's content: what a hub tells of files that are not in its large storage."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
