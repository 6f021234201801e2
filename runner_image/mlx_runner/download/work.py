"""The order of work: what has to be resolved first, then the adapter, which is small, then the model."""

import hashlib
from pathlib import Path

from mlx_operator_api.source import SourceKind
from mlx_operator_api.tasks import ModelFacts

from . import adapter, endpoint, places, result, verify
from .report import Progress, Say
from .request import Request


def work(request: Request, say: Say) -> result.Found:
    """Make model and adapter present and verified.

    Raises:
        ModelError: with the reason, the file and the remedy.
    """
    progress = Progress(say, parts=1 if request.adapter is None else 2)
    source = places.parsed(request.source)
    extra = _Adapter(request, progress, say) if request.adapter is not None else None
    model = None
    if source.kind is SourceKind.HUB:
        endpoint.check()
        from .hub import Model  # only here: what is mounted needs no HTTP client

        model = Model(request, source, progress, say)
    revision = model.commit if model is not None else None
    adapter_revision = extra.commit if extra is not None else None
    if revision is not None or adapter_revision is not None:
        say(result.Resolved(revision=revision, adapter_revision=adapter_revision))
    # A mistake in the adapter is told before gigabytes are fetched.
    fused = extra.obtain() if extra is not None else None
    if model is not None:
        path, facts = model.fetch()
    else:
        path = places.directory(source, request.model_dir)
        facts = verify.verify(path, places.describe(source), request, progress)
    if fused is None:
        return result.Found(facts=facts, path=path)
    known = {"adapter_revision": adapter_revision, "digest": _both(facts, fused[1])}
    return result.Found(facts=facts.model_copy(update=known), path=path, adapter=fused[0])


def _both(facts: ModelFacts, other: str) -> str:
    """One value for the same model with the same adapter on every rank."""
    joined = f"{facts.digest}\0{other}"
    return f"sha256:{hashlib.sha256(joined.encode()).hexdigest()}"


class _Adapter:
    """The adapter, from wherever it is; what is wrong with it names its field of the spec."""

    def __init__(self, request: Request, progress: Progress, say: Say) -> None:
        self._request = request
        self._progress = progress
        with adapter.named():
            self._source = source = places.parsed(request.adapter or "")
            self._hub = None
            if source.kind is SourceKind.HUB:
                endpoint.check()
                from .hub import Adapter  # as above

                self._hub = Adapter(request, source, progress, say)
        self.commit = self._hub.commit if self._hub is not None else None

    def obtain(self) -> tuple[Path, str]:
        """Where it is, and a digest."""
        with adapter.named():
            if self._hub is not None:
                return self._hub.fetch()
            path = places.directory(self._source, self._request.adapter_dir)
            return path, adapter.check(path, places.describe(self._source), self._request, self._progress)
