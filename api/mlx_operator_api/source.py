"""Model sources: `hf://ORG/NAME[@REV]`, `pvc://CLAIM[/PATH]`, `oci://IMAGE`."""

from dataclasses import dataclass
from enum import StrEnum

SCHEMES = "hf://ORG/NAME[@REV], pvc://CLAIM/PATH or oci://IMAGE"


class SourceKind(StrEnum):
    """The schemes."""

    HUB = "hf"
    CLAIM = "pvc"
    IMAGE = "oci"


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source.

    `name` is the repository, the claim or the image; `path` the place inside a claim ("" for its root); `revision`
    that of a hub repository (None: its default branch).
    """

    kind: SourceKind
    name: str
    path: str = ""
    revision: str | None = None


def parse(text: str) -> Source:
    """Parse `spec.model.source` or `spec.model.adapter.source`.

    Raises:
        ValueError: with the value and what is allowed.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in set(SourceKind):
        raise ValueError(f"unsupported model source {text!r}: use {SCHEMES}")
    if not rest.strip("/"):
        raise ValueError(f"model source {text!r} names nothing after {scheme}://: use {SCHEMES}")
    match SourceKind(scheme):
        case SourceKind.HUB:
            repository, _, revision = rest.partition("@")
            return Source(SourceKind.HUB, repository, revision=revision or None)
        case SourceKind.CLAIM:
            claim, _, path = rest.partition("/")
            if ".." in path.split("/"):
                raise ValueError(f"model source {text!r}: the path must not contain '..'")
            return Source(SourceKind.CLAIM, claim, path=path.strip("/"))
        case SourceKind.IMAGE:
            return Source(SourceKind.IMAGE, rest)
