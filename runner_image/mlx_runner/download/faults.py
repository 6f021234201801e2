"""What a hub answers, sorted: what may pass is tried again, what lasts is told with its remedy."""

import errno
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)

from mlx_operator_api.conditions import Reason
from mlx_operator_api.sizes import human_size

from .result import ModelError

_TRANSIENT = {408, 409, 425, 429}
FULL = {errno.ENOSPC, errno.EDQUOT}
"""A file system that takes no more, neither bytes nor files."""
_CREDENTIALS = "spec.model.credentialsSecretRef"


class TransientError(Exception):
    """It may pass by itself. `seconds`: how long the other side asks us to wait."""

    def __init__(self, what: str, seconds: float = 0.0) -> None:
        super().__init__(what)
        self.what = what
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Place:
    """Whom we ask, and for what; for messages."""

    endpoint: str
    """Without user and password."""
    repository: str
    revision: str
    has_token: bool
    field: str = "spec.model"
    """Whose `source` it is."""

    def __str__(self) -> str:
        return f"hf://{self.repository}@{self.revision}"


@contextmanager
def sorted_out(place: Place, subject: str) -> Iterator[None]:
    """Turn what goes wrong inside into one of two: `subject` is the file, or what else is asked for.

    Raises:
        TransientError: it may pass.
        ModelError: it lasts.
    """
    try:
        yield
    except HfHubHTTPError as error:
        raise _answered(error, place, subject) from error
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL, httpx2.LocalProtocolError) as error:
        # What is wrong with an address is told with a piece of it, which may be one of the password.
        why = "it is no valid address" if isinstance(error, httpx2.InvalidURL) else error
        words = f"{place}: {place.endpoint} cannot be asked ({why}): is HF_ENDPOINT right?"
        raise ModelError(Reason.MODEL_UNREACHABLE, words) from error
    except httpx2.RequestError as error:
        if _untrusted(error):
            words = f"{place}: the certificate of {place.endpoint} is not trusted ({error}): set SSL_CERT_FILE"
            raise ModelError(Reason.MODEL_UNREACHABLE, words) from error
        raise TransientError(f"{subject}: {_told(error)}") from error


def _told(error: httpx2.RequestError) -> str:
    """In words that stay the same when it happens again."""
    if isinstance(error, httpx2.ConnectTimeout | httpx2.PoolTimeout):
        return "no connection in time"
    if isinstance(error, httpx2.TimeoutException):
        return "no byte in time"
    return str(error) or type(error).__name__


def _untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _answered(error: HfHubHTTPError, place: Place, subject: str) -> Exception:
    """By the status code, and the code that the hub puts beside it."""
    status = error.response.status_code
    if status in _TRANSIENT or status >= 500:
        return TransientError(f"{subject}: HTTP {status}", _retry_after(error.response))
    host = error.response.url.host
    if status == 403 and host != httpx2.URL(place.endpoint).host and "X-Error-Code" not in error.response.headers:
        # The storage that the hub sent us to: a link that has run out, or clocks that differ; not the token's doing.
        return TransientError(f"{subject}: HTTP {status} from {host}")
    if isinstance(error, GatedRepoError) or status in (401, 403):
        return _unauthorized(error, place, subject)
    if isinstance(error, RevisionNotFoundError):
        words = f"{place}: {place.endpoint} has no revision {place.revision!r} of {place.repository}: correct the part "
        return ModelError(Reason.MODEL_NOT_FOUND, words + f"after @ in {place.field}.source")
    if isinstance(error, RemoteEntryNotFoundError):
        return ModelError(Reason.MODEL_NOT_FOUND, f"{place}: {place.endpoint} has no file {subject}")
    if status in (404, 410):
        words = f"{place}: {place.endpoint} answers HTTP {status} for {subject}: correct the repository's name"
        private = "" if place.has_token else f", or give a token if it is private: {_CREDENTIALS}"
        return ModelError(Reason.MODEL_NOT_FOUND, words + private)
    server = re.sub(r"\s+", " ", error.server_message or "")[:200]
    words = f"{place}: {place.endpoint} answers HTTP {status} for {subject}" + (f": {server}" if server else "")
    return ModelError(Reason.MODEL_UNREACHABLE, words)


def _unauthorized(error: HfHubHTTPError, place: Place, subject: str) -> ModelError:
    status = error.response.status_code
    gated = isinstance(error, GatedRepoError)
    kind = "is gated" if gated else "is private, gated, or does not exist" if status == 401 else "refuses access"
    what = f"{place}: {place.repository} {kind} (HTTP {status} for {subject}); "
    if not place.has_token:
        what += f"no token was given: put one into a Secret under the key token and name it in {_CREDENTIALS}"
    elif gated:
        what += f"the token of {_CREDENTIALS} has no access: accept the conditions on the repository's page"
    else:
        what += f"the token of {_CREDENTIALS} was refused: renew it, or give it the right to read this repository"
    return ModelError(Reason.MODEL_UNAUTHORIZED, what)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds of the header Retry-After (RFC 9110, 10.2.3): a number or a date; 0 without one."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return max(0.0, (until - datetime.now(UTC)).total_seconds()) if until.tzinfo else 0.0


@contextmanager
def room(root: Path, subject: str, missing: int) -> Iterator[None]:
    """A disk that fills up while we write: told as what it is.

    Raises:
        ModelError: NoSpace.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        words = f"{root} is full: {subject} needs {human_size(missing)} more ({error.strerror})"
        raise ModelError(Reason.NO_SPACE, words) from error
