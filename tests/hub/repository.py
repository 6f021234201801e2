"""Repositories as a hub sees them: commits, branches, and files that are in its large storage or not."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

LARGE = 10_000
"""Bytes from which on a file is in the large storage here, besides all weights."""


@dataclass(frozen=True)
class Blob:
    path: Path
    size: int
    sha256: str
    git: str
    large: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git


def blob(path: Path) -> Blob:
    content = path.read_bytes()
    return Blob(
        path=path,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        git=hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest(),
        large=path.suffix == ".safetensors" or len(content) >= LARGE,
    )


@dataclass
class Repository:
    """One repository. A commit is a directory whose files do not change any more."""

    name: str
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    """Whoever has no other may read it; None: everybody may."""
    gated: bool = False
    """Refused also to those who have the token."""

    def push(self, directory: Path, branch: str = "main") -> str:
        """Another commit, to which the branch moves."""
        files = {str(p.relative_to(directory)): blob(p) for p in sorted(directory.rglob("*")) if p.is_file()}
        lines = "".join(f"{name} {found.sha256}\n" for name, found in files.items())
        commit = hashlib.sha1(lines.encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def files(self) -> tuple[str, ...]:
        """Names of the files of the main branch."""
        return tuple(self.commits[self.branches["main"]])

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)
