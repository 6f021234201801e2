"""What is fetched from the Hugging Face hub: of a model the files that this rank needs, of an adapter its two."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import TooFewLayersError
from mlx_operator_api.names import ADAPTER_FIELD
from mlx_operator_api.source import Source
from mlx_operator_api.tasks import ModelFacts

from . import adapter, choice, verify
from .listing import File, Hub, Listing
from .report import Progress, Say
from .repository import Repository, usable
from .request import Request
from .result import ModelError


class Model:
    """A model's repository, resolved.

    Raises:
        ModelError: with the reason, the repository and the remedy.
    """

    def __init__(self, request: Request, source: Source, progress: Progress, say: Say) -> None:
        self._request = request
        with usable(request.cache_dir):
            hub = Hub(source.name, request.revision or source.revision)
            self._repository = Repository(hub, request, progress, say)
        self.commit = self._repository.known.commit

    def fetch(self) -> tuple[Path, ModelFacts]:
        """Make this rank's files present and verified; the directory that holds them, and what they are.

        Raises:
            ModelError: with the reason, the repository, the file and the remedy.
        """
        with usable(self._request.cache_dir):
            return self._fetch()

    def _fetch(self) -> tuple[Path, ModelFacts]:
        repository, known = self._repository, self._repository.known
        weights = self._weights(known)
        small = [file for file in known.files if choice.small(file.name)]
        repository.obtain(small)
        config = verify.config(repository.directory, str(repository.place))
        mine = self._mine(weights, config)
        repository.need((*small, *mine))
        repository.obtain(mine)
        verify.check(repository.directory, [file.name for file in mine])
        facts = ModelFacts(
            revision=known.commit,
            digest=_digest(known, weights),
            bytes=sum(file.size for file in weights),
            architecture=verify.architecture(config),
            layers=verify.layers(config),
        )
        return repository.directory, facts

    def _weights(self, known: Listing) -> list[File]:
        """The weights; told before anything is fetched that the repository has no model that we can read."""
        if known.of(verify.CONFIG) is None:
            raise self._repository.missing(f"no {verify.CONFIG}")
        if not any(known.of(name) for name in verify.TOKENIZERS):
            raise self._repository.missing(f"no tokenizer (one of {', '.join(verify.TOKENIZERS)})")
        weights = [file for file in known.files if choice.weights(file.name)]
        if not weights:
            raise self._repository.missing("no model*.safetensors")
        return weights

    def _mine(self, weights: list[File], config: dict[str, Any]) -> list[File]:
        """The weight files of this rank."""
        place = self._repository.place
        index = verify.index(self._repository.directory)
        by_name = {file.name: file for file in weights}
        if gone := set(index.values()) - set(by_name):
            words = f"{place}: {verify.INDEX} names files that the repository has not: {choice.names(gone)}"
            raise ModelError(Reason.MODEL_CORRUPT, words)
        try:
            mine = choice.mine(self._request, index, verify.layers(config), tied=verify.tied(config))
        except TooFewLayersError as error:
            raise ModelError(Reason.MODEL_UNSUPPORTED, f"{place}: {error}") from error
        return [by_name[name] for name in sorted(mine or by_name)]


class Adapter:
    """An adapter's repository, resolved.

    Raises:
        ModelError: with the reason, the repository and the remedy.
    """

    def __init__(self, request: Request, source: Source, progress: Progress, say: Say) -> None:
        self._request = request
        with usable(request.cache_dir):
            hub = Hub(source.name, request.adapter_revision or source.revision, field=ADAPTER_FIELD)
            self._repository = Repository(hub, request, progress, say)
        self.commit = self._repository.known.commit
        self._files = self._chosen()
        self._repository.need(self._files)

    def _chosen(self) -> list[File]:
        known, files = self._repository.known, []
        for name in adapter.FILES:
            file = known.of(name)
            if file is None:
                there = f"{self._repository.place} at commit {known.commit[:12]}"
                raise adapter.absent(name, there, peft=known.of(choice.ADAPTER_PEFT) is not None)
            files.append(file)
        return files

    def fetch(self) -> tuple[Path, str]:
        """Make its files present and verified; the directory that holds them, and a digest.

        Raises:
            ModelError: with the reason, the repository, the file and the remedy.
        """
        with usable(self._request.cache_dir):
            self._repository.obtain(self._files)
            adapter.inspect(self._repository.directory)
        return self._repository.directory, adapter.digest({file.name: file.etag for file in self._files})


def _digest(known: Listing, weights: Iterable[File]) -> str:
    """One value for the same model on every rank, whichever of its files a rank holds."""
    lines = [f"{file.name}\0{file.size}\0{file.etag}\n" for file in weights]
    lines += [f"{f.name}\0{f.size}\0{f.etag}\n" for f in known.files if f.name in (verify.CONFIG, verify.INDEX)]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
