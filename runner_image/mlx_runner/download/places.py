"""Where the files of a model source are in a runner pod."""

from pathlib import Path

from mlx_operator_api.conditions import Reason
from mlx_operator_api.source import Source, SourceKind, parse

from .result import ModelError


def parsed(source: str) -> Source:
    """Read a source.

    Raises:
        ModelError: it is none that this release knows; the operator may be a newer one.
    """
    try:
        return parse(source)
    except ValueError as error:
        raise ModelError(Reason.SOURCE_UNSUPPORTED, str(error)) from error


def directory(source: Source, mount: Path) -> Path:
    """The directory of what is mounted: `pvc://CLAIM/PATH` is MOUNT/PATH, `oci://IMAGE` is MOUNT."""
    return mount / source.path if source.kind is SourceKind.CLAIM and source.path else mount


def describe(source: Source) -> str:
    """The place for a message: `claim models` or `image registry/model:1`."""
    return f"{'claim' if source.kind is SourceKind.CLAIM else 'image'} {source.name}"
