"""HF_ENDPOINT, before huggingface_hub reads it: what is wrong with it is told without the password that it may have."""

import os
import re
from urllib.parse import urlsplit

from mlx_operator_api.conditions import Reason

from .result import ModelError

_VARIABLE = "HF_ENDPOINT"
_USER = re.compile(r"(?<=://).*@")


def address(endpoint: str) -> str:
    """An endpoint, valid or not, without the user and password that may stand in it."""
    return _USER.sub("", endpoint)


def check() -> None:
    """An address that cannot be read: huggingface_hub fails on it while it is imported, with a piece of the address.

    Raises:
        ModelError: ModelUnreachable.
    """
    endpoint = os.environ.get(_VARIABLE, "")
    if endpoint and not _readable(endpoint):
        words = (
            f"{_VARIABLE} {address(endpoint)} in spec.runner.env is no valid address: write https://HOST[:PORT], and "
            "of a user or password each character that has a meaning in an address as %XX"
        )
        raise ModelError(Reason.MODEL_UNREACHABLE, words)


def _readable(endpoint: str) -> bool:
    try:
        parts = urlsplit(endpoint)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
