"""Where the files of a model source are in a runner pod."""

from pathlib import Path

from mlx_operator_api.conditions import Reason
from mlx_operator_api.source import SourceKind, parse

from .result import ModelError


def directory(source: str, mount: Path) -> Path:
    """The directory of a source: `pvc://CLAIM/PATH` is MOUNT/PATH, `oci://IMAGE` is MOUNT.

    Raises:
        ModelError: the source is none that this release reads.
    """
    try:
        parsed = parse(source)
    except ValueError as error:
        raise ModelError(Reason.SOURCE_UNSUPPORTED, str(error)) from error
    match parsed.kind:
        case SourceKind.CLAIM:
            return mount / parsed.path if parsed.path else mount
        case SourceKind.IMAGE:
            return mount
        case SourceKind.HUB:
            raise ModelError(
                Reason.SOURCE_UNSUPPORTED,
                f"model source {source!r}: this release does not download from the Hugging Face hub",
            )


def describe(source: str) -> str:
    """The place for a message: `claim models` or `image registry/model:1`."""
    parsed = parse(source)
    return f"{'claim' if parsed.kind is SourceKind.CLAIM else 'image'} {parsed.name}"
