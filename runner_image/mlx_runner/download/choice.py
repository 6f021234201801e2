"""Which files of a hub repository a rank needs: never code, never pickles, and of the weights only its own.

What cannot be told from a tensor's name is needed by everybody: a file too many costs time, one too few the start.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from mlx_operator_api.layers import Span, split
from mlx_operator_api.tasks import Sharding

from .request import Request

_SMALL = ("*.json", "*.jsonl", "*.txt", "*.jinja", "*.model", "*.tiktoken")
"""Configuration, tokenizer and chat template, as mlx-lm and transformers read them."""
_WEIGHTS = "model*.safetensors"
"""What mlx-lm reads; other *.safetensors (such as `consolidated`) are the same weights a second time."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapters.safetensors"
"""Of an adapter, as mlx-lm reads it."""
ADAPTER_PEFT = "adapter_model.safetensors"
"""What PEFT calls its weights: never fetched, named in messages."""
_NAME = re.compile(r"(additional_chat_templates/)?[A-Za-z0-9_+,=@-][A-Za-z0-9._+,=@-]*")
"""Of the repository's top folder, and nothing that leads out of it."""
_OUTER = r"(?:model\.|language_model\.|transformer\.|backbone\.|gpt_neox\.)*"
"""What a text model's modules are wrapped in."""
_LAYER = re.compile(_OUTER + r"(?:layers|h|blocks)\.(\d+)\.")
_FIRST = re.compile(_OUTER + r"(?:embed_tokens|wte|word_embeddings|embed_in|embeddings|tok_embeddings)\.")
_HEAD = re.compile(_OUTER + r"(?:lm_head|embed_out|output)\.")
_LAST = re.compile(_OUTER + r"(?:norm|final_layernorm|final_layer_norm|ln_f|norm_f)\.")


def small(name: str) -> bool:
    """A file that every rank needs."""
    return _NAME.fullmatch(name) is not None and any(fnmatchcase(name, pattern) for pattern in _SMALL)


def weights(name: str) -> bool:
    """A file that may hold tensors of a rank."""
    return "/" not in name and _NAME.fullmatch(name) is not None and fnmatchcase(name, _WEIGHTS)


def adapter(name: str) -> bool:
    """A file of an adapter, or one that tells of another form."""
    return name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PEFT)


def _needed(tensor: str, span: Span, *, tied: bool) -> bool:
    if (layer := _LAYER.match(tensor)) is not None:
        # Beyond the last layer some models keep others, for guessing tokens ahead: with the last ones.
        number = min(int(layer.group(1)), span.total - 1)
        return span.start <= number < span.end
    if _FIRST.match(tensor):
        return span.first or (span.last and tied)
    if _HEAD.match(tensor) or _LAST.match(tensor):
        return span.last
    return True


def mine(request: Request, weight_map: Mapping[str, str], layers: int, *, tied: bool) -> frozenset[str]:
    """The weight files of a rank, by the index's map from tensors to files: all, but for a stage of a pipeline.

    `layers`: 0 where they are not known. `tied`: the configuration says that the head is the embedding.

    Raises:
        TooFewLayersError: the model has fewer layers than there are ranks.
    """
    if request.world_size == 1 or request.sharding is not Sharding.PIPELINE or layers == 0:
        return frozenset(weight_map.values())
    span = split(layers, request.world_size, request.memory_limits)[request.rank]
    tied = tied or not any(_HEAD.match(tensor) for tensor in weight_map)
    return frozenset(file for tensor, file in weight_map.items() if _needed(tensor, span, tied=tied))


def names(files: Iterable[str]) -> str:
    """The first few of them, for messages."""
    ordered = sorted(files)
    return ", ".join(ordered[:5]) + (", …" if len(ordered) > 5 else "")
