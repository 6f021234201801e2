"""A model from the Hugging Face hub: one commit for all ranks, of its files those that this rank needs."""

import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import TooFewLayersError
from mlx_operator_api.sizes import human_size
from mlx_operator_api.source import Source
from mlx_operator_api.tasks import ModelFacts

from . import choice, faults, listing, result, verify
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


def fetch(request: Request, source: Source, say: Say) -> tuple[Path, ModelFacts]:
    """Make this rank's files present and verified; the directory that holds them, and what they are.

    Raises:
        ModelError: with the reason, the repository, the file and the remedy.
    """
    work = _Fetch(request, source, say)
    try:
        return work.run()
    except OSError as error:
        # The cache's file system: answers with errors, is read-only, is not ours.
        place = error.filename or request.cache_dir
        words = f"the cache cannot be used by user {os.getuid()}: {place}: {error.strerror}"
        raise ModelError(Reason.MODEL_UNREACHABLE, words) from error


class _Fetch:
    def __init__(self, request: Request, source: Source, say: Say) -> None:
        self._request = request
        self._say = say
        self._hub = Hub(source.name, request.revision or source.revision)
        self._cache = Cache(request.cache_dir, source.name)
        self._progress = Progress(say)
        self._directory = request.cache_dir

    def run(self) -> tuple[Path, ModelFacts]:
        with faults.room(self._cache.root, "the model", 0):
            self._cache.prepare()
            known = self._resolve()
        self._say(result.Resolved(revision=known.commit))
        weights = self._weights(known)
        transfer = Transfer(self._hub, known.commit, self._cache, self._say)
        self._directory = self._cache.snapshot(known.commit)
        small = [file for file in known.files if choice.small(file.name)]
        self._obtain(transfer, small)
        config = verify.config(self._directory, str(self._hub.place))
        mine = self._mine(weights, config)
        self._progress.need({file.name: file.size for file in (*small, *mine)})
        self._obtain(transfer, mine)
        verify.check(self._directory, [file.name for file in mine])
        facts = ModelFacts(
            revision=known.commit,
            digest=_digest(known, weights),
            bytes=sum(file.size for file in weights),
            architecture=verify.architecture(config),
            layers=verify.layers(config),
        )
        return self._directory, facts

    def _resolve(self) -> Listing:
        """The list of files: remembered for a commit, asked for what else a revision is."""
        revision = self._hub.revision
        if listing.COMMIT.fullmatch(revision):
            known = listing.load(self._cache.listing(revision), revision)
            if known is not None:
                return known
        found = Patience(self._say).until_done(self._hub.list)
        write(self._cache.listing(found.commit), found.model_dump_json(by_alias=True))
        if revision != found.commit:
            self._cache.remember(revision, found.commit)
        return found

    def _weights(self, known: Listing) -> list[File]:
        """The weights; told before anything is fetched that the repository has no model that we can read."""
        if known.of(verify.CONFIG) is None:
            raise self._missing(f"no {verify.CONFIG}", known)
        if not any(known.of(name) for name in verify.TOKENIZERS):
            raise self._missing(f"no tokenizer (one of {', '.join(verify.TOKENIZERS)})", known)
        weights = [file for file in known.files if choice.weights(file.name)]
        if not weights:
            raise self._missing("no model*.safetensors", known)
        return weights

    def _missing(self, what: str, known: Listing) -> ModelError:
        has = f"it has {choice.names(file.name for file in known.files)}" if known.files else "no file of it is used"
        words = f"{self._hub.place} has {what} in its top folder at commit {known.commit[:12]} ({has})"
        return ModelError(Reason.MODEL_NOT_FOUND, words)

    def _mine(self, weights: list[File], config: dict[str, Any]) -> list[File]:
        """The weight files of this rank."""
        index = verify.index(self._directory)
        by_name = {file.name: file for file in weights}
        if absent := set(index.values()) - set(by_name):
            words = f"{self._hub.place}: {verify.INDEX} names files that the repository has not: {choice.names(absent)}"
            raise ModelError(Reason.MODEL_CORRUPT, words)
        try:
            mine = choice.mine(self._request, index, verify.layers(config), tied=verify.tied(config))
        except TooFewLayersError as error:
            raise ModelError(Reason.MODEL_UNSUPPORTED, f"{self._hub.place}: {error}") from error
        return [by_name[name] for name in sorted(mine or by_name)]

    def _obtain(self, transfer: Transfer, files: list[File]) -> None:
        """Make files present, each fetched by one process at a time; what another one fetches comes last."""
        self._check_room(transfer, files)
        waiting, blocked = deque(files), 0
        while waiting:
            file = waiting.popleft()
            with self._cache.lock(file.etag) as ours:
                if ours:
                    self._one(transfer, file)
                    blocked = 0
                    continue
            self._progress.at(file.name, file.size - transfer.missing(file))
            waiting.append(file)
            blocked += 1
            if blocked >= len(waiting):
                time.sleep(_POLL_SECONDS)

    def _one(self, transfer: Transfer, file: File) -> None:
        def tell(done: int) -> None:
            self._progress.at(file.name, done)

        if not transfer.verified(file, tell):
            transfer.fetch(file, tell)

    def _check_room(self, transfer: Transfer, files: Iterable[File]) -> None:
        """Before anything is fetched: does it fit?"""
        missing = sum(transfer.missing(file) for file in files)
        free = shutil.disk_usage(self._cache.root).free
        where, limit = f"the cache {self._cache.root} has {human_size(free)} free", self._request.cache_bytes
        if limit is not None and (left := max(0, limit - self._cache.used())) < free:
            free, where = left, f"spec.cache.sizeLimit leaves {human_size(left)} of {human_size(limit)}"
        if missing > free:
            words = f"{self._hub.place} needs {human_size(missing)} more for rank {self._request.rank}, {where}"
            raise ModelError(Reason.NO_SPACE, words)


def _digest(known: Listing, weights: Iterable[File]) -> str:
    """One value for the same model on every rank, whichever of its files a rank holds."""
    lines = [f"{file.name}\0{file.size}\0{file.etag}\n" for file in weights]
    lines += [f"{f.name}\0{f.size}\0{f.etag}\n" for f in known.files if f.name in (verify.CONFIG, verify.INDEX)]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
