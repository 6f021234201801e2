"""Models and adapters that are images: which field of the spec a word of the kubelet or the API server is about."""

import re
from collections.abc import Mapping

from mlx_operator_api.source import SourceKind

from . import remedies
from .spec import Wanted

_NO_IMAGE_VOLUME = re.compile(r"must specify (a|one) volume type|ImageVolumeMountFailed|image volumes? .*not support")
"""A node or an API server that knows no image volumes."""


def _of(wanted: Wanted) -> Mapping[str, str]:
    """Image by the field that names it."""
    places = (("spec.model.source", wanted.source), ("spec.model.adapter.source", wanted.adapter))
    return {field: s.name for field, s in places if s is not None and s.kind is SourceKind.IMAGE}


def pull_remedy(wanted: Wanted, words: str) -> str | None:
    """The next step where an image that cannot be pulled is the model's or the adapter's; None: it is the runner's."""
    # One name may begin like another one: the longest is meant.
    named = [(len(image), field) for field, image in _of(wanted).items() if image in words]
    return remedies.MODEL_IMAGE.format(field=max(named)[1]) if named else None


def volume_remedy(wanted: Wanted, words: str) -> str | None:
    """The next step where image volumes are unknown; None: the words say something else, or the spec needs none."""
    fields = _of(wanted)
    if not fields or _NO_IMAGE_VOLUME.search(words) is None:
        return None
    return remedies.IMAGE_VOLUME.format(field=" and ".join(fields))
