"""Stages of a pipeline: some whole layers of a model, for any architecture of a plain decoder's structure.

Rank n-1 holds the first layers and the embedding, rank 0 the last ones with norm and head; a rank between holds
neither. mlx-lm's own pipelines exist for few architectures, keep everything on every rank and end each step in a
collective.
"""

from typing import Any

from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_operator_api.conditions import Reason
from mlx_operator_api.layers import Span, TooFewLayersError, split

from .failures import EngineError

VERIFIED = (
    "glm4",
    "llama",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "starcoder2",
)
"""Modules of mlx_lm.models whose forward pass is embed → layers(h, mask, cache) → norm → head, tested token for token.

Others may have the attributes and still do more between them (scaled embeddings, soft caps), which would be silently
wrong: they are refused until a test holds them.
"""


def span(total: int, rank: int, world_size: int) -> Span:
    """The layers of a rank.

    Raises:
        EngineError: fewer layers than ranks.
    """
    try:
        return split(total, world_size)[rank]
    except TooFewLayersError as error:
        raise EngineError(Reason.MODEL_UNSUPPORTED, str(error)) from error


def largest(total: int, world_size: int) -> int:
    """The most layers that any rank has; see `span`."""
    return max(part.end - part.start for part in split(total, world_size))


def architecture(model_class: type) -> str:
    """Module of mlx_lm.models that implements a model (after mlx-lm's own remapping)."""
    for base in model_class.__mro__:
        if base.__module__.startswith("mlx_lm.models."):
            return base.__module__.rpartition(".")[2]
    return model_class.__module__


def check(model: Any) -> None:
    """Refuse what this split was not verified for.

    Raises:
        EngineError: another architecture, or a variant of one with layers of several kinds.
    """
    name = architecture(type(model))
    inner: Any = getattr(model, "model", None)
    plain = all(hasattr(inner, part) for part in ("layers", "embed_tokens", "norm"))
    if name not in VERIFIED or not plain:
        raise EngineError(
            Reason.MODEL_UNSUPPORTED,
            f"architecture {name} cannot be split into a pipeline; supported: {', '.join(VERIFIED)}, "
            "any other with one runner",
        )
    special = {type(cache).__name__ for cache in make_prompt_cache(model)} - {KVCache.__name__}
    if special:
        raise EngineError(
            Reason.MODEL_UNSUPPORTED,
            f"this {name} model has layers with a {', '.join(sorted(special))} (such as a sliding window), "
            "which cannot be split into a pipeline; use one runner",
        )


def cut(model: Any, part: Span) -> None:
    """Leave only this stage's modules in a model that was not read yet; layers keep their numbers."""
    inner = model.model
    inner.layers = [layer if part.start <= i < part.end else None for i, layer in enumerate(inner.layers)]
    tied = "lm_head" not in model
    if not (part.first or (part.last and tied)):
        del inner["embed_tokens"]
    if not part.last:
        del inner["norm"]
        if not tied:
            del model["lm_head"]


class Stage:
    """One rank's part of the forward pass."""

    def __init__(self, model: Any, part: Span) -> None:
        inner = model.model
        self.span = part
        self._layers = [layer for layer in inner.layers if layer is not None]
        self._embed = inner.embed_tokens if part.first else None
        self._norm = inner.norm if part.last else None
        self._head = None
        if part.last:
            self._head = model.lm_head if "lm_head" in model else inner.embed_tokens.as_linear

    def make_cache(self) -> list[Any]:
        """Caches of the layers here, for one sequence."""
        return [KVCache() for _ in self._layers]

    def embed(self, tokens: Any) -> Any:
        """Hidden states (rows, positions, hidden) of token ids (rows, positions); first stage only."""
        assert self._embed is not None  # noqa: S101 (narrowing)
        return self._embed(tokens)

    def run(self, hidden: Any, cache: list[Any]) -> Any:
        """Hidden states after the layers here."""
        mask = create_attention_mask(hidden, cache[0])
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            hidden = layer(hidden, mask, layer_cache)
        return hidden

    def logits(self, hidden: Any) -> Any:
        """Logits (rows, vocabulary) of the last position; last stage only."""
        assert self._norm is not None  # noqa: S101 (narrowing)
        assert self._head is not None  # noqa: S101 (narrowing)
        return self._head(self._norm(hidden[:, -1]))
