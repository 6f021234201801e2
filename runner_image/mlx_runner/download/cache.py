"""The cache of downloads: the Hugging Face hub's own layout, so that its tools read it, and locks that die with us.

    models--ORG--NAME/blobs/ETAG              a file's content, verified before it gets this name
    models--ORG--NAME/blobs/ETAG.incomplete   as far as it was fetched; goes on after any kill
    models--ORG--NAME/snapshots/COMMIT/FILE   a link to its blob
    models--ORG--NAME/refs/REVISION           the commit that a branch or tag was last resolved to
    .locks/models--ORG--NAME/                 locks, and what we remember: hashes, lists of files

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. huggingface_hub itself fetches into a file of
a random name and starts from nothing after a kill, so its download functions are not used.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.file_download import repo_folder_name

from .files import write

log = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_NO_NAME = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
"""A branch is called as the folder of another one was, or too long for a file."""
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Cache:
    """The part of a cache that belongs to one repository."""

    def __init__(self, root: Path, repository: str) -> None:
        name = repo_folder_name(repo_id=repository, repo_type="model")
        self.root = root
        self.folder = root / name
        self._aside = root / ".locks" / name

    def prepare(self) -> None:
        """Make the folders."""
        for folder in (self.folder / "blobs", self.folder / "refs", self._aside):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def memory(self) -> Path:
        """Hashes of the blobs; beside the blobs, so that every pod on a shared cache knows them."""
        return self._aside / "mlx-operator-hashes.json"

    def listing(self, commit: str) -> Path:
        """The list of a commit's files: with it nothing has to be asked again."""
        return self._aside / f"mlx-operator-{commit}.json"

    def snapshot(self, commit: str) -> Path:
        """The directory that looks like the repository."""
        return self.folder / "snapshots" / commit

    def blob(self, etag: str) -> Path:
        """Where a whole, verified file is."""
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """Where a file is while it is fetched."""
        return self.folder / "blobs" / f"{etag}.incomplete"

    def remember(self, revision: str, commit: str) -> None:
        """What a branch or tag stands for, for the hub's own tools: nothing of ours needs it."""
        if ".." in revision.split("/") or revision.startswith("/"):
            return  # no branch is called so, and it would lead elsewhere
        path = self.folder / "refs" / revision
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, commit)
        except OSError as error:
            if error.errno not in _NO_NAME:
                raise

    def path(self, commit: str, name: str, etag: str) -> Path | None:
        """Where a file is: in its snapshot, or only as a blob of another commit; None where it is not."""
        places = (self.snapshot(commit) / name, self.blob(etag))
        return next((place for place in places if place.is_file()), None)

    def link(self, commit: str, name: str, etag: str) -> None:
        """Let a blob appear in its snapshot; where there are no links, the blob itself goes there."""
        pointer, blob = self.snapshot(commit) / name, self.blob(etag)
        if pointer.is_file():
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.replace(blob, pointer)

    @contextmanager
    def lock(self, etag: str) -> Iterator[bool]:
        """The right to fetch a file, for one process at a time; False: another one has it. Never waits.

        The kernel keeps the lock (flock, on the file that huggingface_hub locks too) and takes it back from a process
        that dies. Where a file system has none, two may fetch the same bytes to the same places: that costs time only.
        """
        path = self._aside / f"{etag}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
        try:
            yield _locked(handle, path)
        finally:
            os.close(handle)

    def used(self) -> int:
        """Bytes on disk of everything in the cache."""
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
                except FileNotFoundError:
                    continue
        return total


def _locked(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s cannot be locked (%s): another rank may fetch the same file", path, error.strerror)
        return True
    # Some releases of the hub's tools remove a lock file: one that has no name any more locks nothing.
    try:
        return os.stat(path).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False
