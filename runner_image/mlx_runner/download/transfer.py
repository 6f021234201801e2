"""One file from the hub into the cache: resumed, verified, and only then given its name."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from mlx_operator_api.conditions import Reason

from . import faults, hashes, result
from .cache import Cache
from .faults import TransientError
from .hashes import Hashes
from .listing import File, Hub
from .patience import Patience
from .report import Say
from .result import ModelError

Tell = Callable[[int], None]
"""Hears how many bytes of the file are there."""
_RANGE = re.compile(r"bytes (\d+)-")


class Transfer:
    """Files of one commit."""

    def __init__(self, hub: Hub, commit: str, cache: Cache, say: Say) -> None:
        self._hub = hub
        self._commit = commit
        self._cache = cache
        self._say = say
        self._hashes = Hashes(cache.memory)

    def verified(self, file: File, tell: Tell) -> bool:
        """Whether the file is there, and is what it must be; a wrong one is removed."""
        path = self._cache.path(self._commit, file.name, file.etag)
        if path is None:
            return False
        real = path.resolve()
        wrong = _wrong(file, real, lambda: self._hashes.sha256(real, lambda _: None))
        if wrong is not None:
            self._say(result.Trouble(what=f"{file.name} in the cache has {wrong}: removed"))
            real.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            return False
        self._cache.link(self._commit, file.name, file.etag)
        tell(file.size)
        return True

    def fetch(self, file: File, tell: Tell) -> None:
        """Fetch, verify and link it; what does not verify is fetched once more from the start. Hold its lock.

        Raises:
            ModelError: it cannot be had, or came wrong twice.
        """
        partial, wrong = self._cache.partial(file.etag), ""
        for _ in range(2):
            with faults.room(self._cache.root, file.name, file.size - self.fetched(file)):
                self._complete(file, tell)
                found = _wrong(file, partial, lambda: hashes.sha256(partial, lambda _: None))
                if found is None:
                    return self._keep(file)
            wrong = found
            partial.unlink(missing_ok=True)
            tell(0)
            self._say(result.Trouble(what=f"{file.name} came with {wrong}: removed"))
        words = f"{self._hub.place}: {file.name} came twice with {wrong}: look at the hub, or at the proxy before it"
        raise ModelError(Reason.MODEL_CORRUPT, words)

    def missing(self, file: File) -> int:
        """Bytes of it that are still to be fetched, as far as sizes tell."""
        there = self._cache.path(self._commit, file.name, file.etag) is not None
        return 0 if there else max(0, file.size - self.fetched(file))

    def fetched(self, file: File) -> int:
        """Bytes of a file that is not whole yet."""
        try:
            return self._cache.partial(file.etag).stat().st_size
        except FileNotFoundError:
            return 0

    def _complete(self, file: File, tell: Tell) -> None:
        """Fetch what is missing, as often as it takes."""
        patience = Patience(self._say)
        while (before := self.fetched(file)) < file.size or not self._cache.partial(file.etag).exists():
            try:
                with faults.sorted_out(self._hub.place, file.name):
                    self._stream(file, before, tell)
                after = self.fetched(file)
                if after == before:
                    return  # the other side has no more of it: its size is wrong
                if after < file.size:
                    raise TransientError(f"{file.name}: the answer ended before the file")
            except TransientError as error:
                if self.fetched(file) > before:
                    patience.renew()
                patience.wait(error)

    def _stream(self, file: File, start: int, tell: Tell) -> None:
        # Written by place, and never behind the end of the file: whoever writes there too writes the same bytes.
        headers = build_hf_headers(token=self._hub.token or False) | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        url = self._hub.url(file.name, self._commit)
        timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
            if answer.status_code == httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return
            hf_raise_for_status(answer)
            begin = _begin(answer)
            if begin not in (0, start):
                raise TransientError(f"{file.name}: asked for bytes from {start}, got them from {begin}")
            path = self._cache.partial(file.etag)
            with path.open("r+b" if path.exists() else "wb", buffering=0) as out:
                self._write(out.fileno(), answer, file, begin, tell)

    @staticmethod
    def _write(handle: int, answer: httpx2.Response, file: File, begin: int, tell: Tell) -> None:
        if begin == 0:
            os.ftruncate(handle, 0)
        place = begin
        for chunk in answer.iter_raw():
            view = memoryview(chunk)
            while view:
                written = os.pwrite(handle, view, place)
                place += written
                view = view[written:]
            tell(place)
            if place > file.size:
                return  # more than there can be: found when it is verified

    def _keep(self, file: File) -> None:
        partial, blob = self._cache.partial(file.etag), self._cache.blob(file.etag)
        # A node that crashes must not leave an empty file with a good name.
        with partial.open("rb") as content:
            os.fsync(content.fileno())
        os.replace(partial, blob)
        if file.sha256:
            self._hashes.remember(blob.resolve(), file.sha256)
        self._cache.link(self._commit, file.name, file.etag)


def _begin(answer: httpx2.Response) -> int:
    """The place in the file that an answer starts at; one without a range starts at the beginning."""
    if answer.status_code != httpx2.codes.PARTIAL_CONTENT:
        return 0
    found = _RANGE.match(answer.headers.get("Content-Range", ""))
    return int(found.group(1)) if found else -1


def _wrong(file: File, path: Path, sha256: Callable[[], str]) -> str | None:
    """What does not fit to what the hub says of a file, with the numbers."""
    size = path.stat().st_size if path.exists() else 0
    if size != file.size:
        return f"{size} bytes, the hub says {file.size}"
    if file.sha256 and (found := sha256()) != file.sha256:
        return f"sha256 {found[:16]}…, the hub says {file.sha256[:16]}…"
    if file.git_blob and (found := hashes.git_blob(path)) != file.git_blob:
        return f"git blob {found[:16]}…, the hub says {file.git_blob[:16]}…"
    return None
