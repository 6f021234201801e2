"""A repository of a hub at one commit: resolved once, its files made present in the cache, each by one process."""

import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_operator_api.conditions import Reason
from mlx_operator_api.sizes import human_size

from . import choice, faults, listing
from .cache import Cache
from .files import write
from .listing import File, Hub, Listing
from .patience import Patience
from .report import Progress, Say
from .request import Request
from .result import ModelError
from .transfer import Transfer

_POLL_SECONDS = 0.2
"""While another rank has what we need."""


@contextmanager
def usable(cache: Path) -> Iterator[None]:
    """A cache whose file system answers with errors, is full, is read-only, is not ours: told as what it is.

    Raises:
        ModelError: NoSpace or ModelUnreachable.
    """
    try:
        yield
    except OSError as error:
        if error.errno in faults.FULL:
            words = f"{cache} is full: it has no room for {error.filename or 'another file'} ({error.strerror})"
            raise ModelError(Reason.NO_SPACE, words) from error
        words = f"the cache cannot be used by user {os.getuid()}: {error.filename or cache}: {error.strerror}"
        raise ModelError(Reason.MODEL_UNREACHABLE, words) from error


class Repository:
    """One repository, at the commit that its revision stands for when this is made.

    Raises:
        ModelError: it cannot be resolved.
    """

    def __init__(self, hub: Hub, request: Request, progress: Progress, say: Say) -> None:
        self.place = hub.place
        self._request = request
        self._progress = progress
        self._say = say
        self._cache = Cache(request.cache_dir, hub.repository)
        self._cache.prepare()
        self.known = self._resolve(hub)
        self.directory = self._cache.snapshot(self.known.commit)
        self._transfer = Transfer(hub, self.known.commit, self._cache, say)

    def _resolve(self, hub: Hub) -> Listing:
        """The list of files: remembered for a commit, asked for what else a revision is."""
        if listing.COMMIT.fullmatch(hub.revision):
            known = listing.load(self._cache.listing(hub.revision), hub.revision)
            if known is not None:
                return known
        found = Patience(self._say).until_done(hub.list)
        write(self._cache.listing(found.commit), found.model_dump_json(by_alias=True))
        if hub.revision != found.commit:
            self._cache.remember(hub.revision, found.commit)
        return found

    def missing(self, what: str) -> ModelError:
        """The repository has not what is needed."""
        has = f"it has {choice.names(file.name for file in self.known.files)}"
        has = has if self.known.files else "no file of it is used"
        words = f"{self.place} has {what} in its top folder at commit {self.known.commit[:12]} ({has})"
        return ModelError(Reason.MODEL_NOT_FOUND, words)

    def need(self, files: Iterable[File]) -> None:
        """Count these files in the progress."""
        self._progress.need({self._key(file): file.size for file in files})

    def _key(self, file: File) -> str:
        return str(self.directory / file.name)

    def obtain(self, files: list[File]) -> None:
        """Make files present, each fetched by one process at a time; what another one fetches comes last."""
        self._check_room(files)
        waiting, blocked = deque(files), 0
        while waiting:
            file = waiting.popleft()
            with self._cache.lock(file.etag) as ours:
                if ours:
                    self._one(file)
                    blocked = 0
                    continue
            self._progress.at(self._key(file), file.size - self._transfer.missing(file))
            waiting.append(file)
            blocked += 1
            if blocked >= len(waiting):
                time.sleep(_POLL_SECONDS)

    def _one(self, file: File) -> None:
        def tell(done: int) -> None:
            self._progress.at(self._key(file), done)

        if not self._transfer.verified(file, tell):
            self._transfer.fetch(file, tell)

    def _check_room(self, files: Iterable[File]) -> None:
        """Before anything is fetched: does it fit?"""
        missing = sum(self._transfer.missing(file) for file in files)
        free = shutil.disk_usage(self._cache.root).free
        where, limit = f"the cache {self._cache.root} has {human_size(free)} free", self._request.cache_bytes
        if limit is not None and (left := max(0, limit - self._cache.used())) < free:
            free, where = left, f"spec.cache.sizeLimit leaves {human_size(left)} of {human_size(limit)}"
        if missing > free:
            words = f"{self.place} needs {human_size(missing)} more for rank {self._request.rank}, {where}"
            raise ModelError(Reason.NO_SPACE, words)
