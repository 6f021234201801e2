"""The files of a commit of a hub repository: names, sizes, and what their content must be."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HFValidationError
from pydantic import ValidationError

from mlx_operator_api import names
from mlx_operator_api.base import Lenient
from mlx_operator_api.conditions import Reason

from . import choice, endpoint
from .faults import Place, sorted_out
from .result import ModelError

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""It becomes a file's name."""
DEFAULT_REVISION = constants.DEFAULT_REVISION


class File(Lenient):
    """One file that a runner may need."""

    name: str
    size: int
    etag: str
    """sha256 of its content (of large files), or git's name for it."""

    @property
    def sha256(self) -> str | None:
        """What its content must have, where the hub says so."""
        return self.etag if _SHA256.fullmatch(self.etag) else None

    @property
    def git_blob(self) -> str | None:
        """The same, for small files."""
        return self.etag if COMMIT.fullmatch(self.etag) else None


class Listing(Lenient):
    """What a revision stands for."""

    commit: str
    files: tuple[File, ...]

    def of(self, name: str) -> File | None:
        """A file by its name."""
        return next((file for file in self.files if file.name == name), None)


class Hub:
    """A hub and one revision of a repository. Endpoint, proxies and token come from the environment, as ever."""

    def __init__(self, repository: str, revision: str | None, *, field: str = "spec.model") -> None:
        self.repository = repository
        self.revision = revision or DEFAULT_REVISION
        self.token = os.environ.get(names.HUB_TOKEN_ENV, "").strip()
        self.place = Place(endpoint.address(constants.ENDPOINT), repository, self.revision, bool(self.token), field)
        if self.token and not (self.token.isascii() and self.token.isprintable()):
            words = f"{self.place}: the token of spec.model.credentialsSecretRef has characters that no token has"
            raise ModelError(Reason.MODEL_UNAUTHORIZED, words)

    def url(self, name: str, commit: str) -> str:
        """Where a file is fetched."""
        return hf_hub_url(self.repository, name, revision=commit)

    def list(self) -> Listing:
        """Resolve the revision and list the files that matter.

        Raises:
            TransientError: it may pass.
            ModelError: it lasts.
        """
        with sorted_out(self.place, self.repository):
            try:
                found = HfApi(token=self.token or False).model_info(
                    self.repository,
                    revision=self.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
            except HFValidationError as error:
                raise ModelError(Reason.MODEL_NOT_FOUND, f"{self.place} names no repository: {error}") from error
            except (KeyError, TypeError, AttributeError) as error:
                raise self._strange(repr(error)) from error
            except ValueError as error:
                if isinstance(error, OSError):
                    raise  # an answer of the hub: sorted out above
                raise self._strange(str(error)) from error
        if not isinstance(found.sha, str) or not COMMIT.fullmatch(found.sha):
            raise self._strange(f"the commit {found.sha!r}")
        siblings = {s.rfilename: s for s in found.siblings or () if isinstance(s.rfilename, str)}
        files = []
        for name, sibling in sorted(siblings.items()):
            if not _relevant(name):
                continue
            etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            size = sibling.lfs.size if sibling.lfs else sibling.size
            files.append(self._file(name, found.sha, etag, size))
        return Listing(commit=found.sha, files=tuple(files))

    def _file(self, name: str, commit: str, etag: str | None, size: int | None) -> File:
        if etag is None or size is None:
            # A mirror may list names only.
            with sorted_out(self.place, name):
                metadata = get_hf_file_metadata(
                    self.url(name, commit), token=self.token or False, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
                )
            etag, size = metadata.etag, metadata.size
        if etag is None or size is None or size < 0 or not _ETAG.fullmatch(etag):
            raise self._strange(f"the etag {etag!r} and the size {size!r} of {name}")
        return File(name=name, size=size, etag=etag)

    def _strange(self, what: str) -> ModelError:
        words = f"{self.place}: {self.place.endpoint} does not answer as a hub does ({what}): is HF_ENDPOINT right?"
        return ModelError(Reason.MODEL_UNREACHABLE, words)


def load(path: Path, commit: str) -> Listing | None:
    """The list that an earlier download kept; None where there is none that can be read."""
    try:
        found = Listing.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    # A shared cache is written by others too: what they wrote must not lead out of it.
    sound = all(_relevant(file.name) and _ETAG.fullmatch(file.etag) and file.size >= 0 for file in found.files)
    return found if sound and found.commit == commit else None


def _relevant(name: str) -> bool:
    return choice.small(name) or choice.weights(name) or choice.adapter(name)
