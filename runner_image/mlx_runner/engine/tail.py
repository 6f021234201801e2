"""The first token of an answer out of the pass over its prompt: only the prompt's end goes through norm and head.

mlx-lm prefills all but the last token of a prompt and then makes a step for the last one. A step costs mostly the
reading of the weights, so computing the last token with the others saves one of the two passes over them. The head
must not see the other positions: with a large vocabulary it would cost more than is saved. So what the last layer
gives is cut down to the end of each row, where `anatomy.ends_suffice` has found that this changes nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .anatomy import ends, layers_of, swap


class Tail:
    """The last layer of a model that was read; it stays as it is but in the body of `only`."""

    def __init__(self, model: Any) -> None:
        self._lengths: Sequence[int] | None = None
        layer = layers_of(model)[-1]
        original: Any = type(layer).__call__

        def call(layer: Any, *args: Any, **options: Any) -> Any:
            hidden = original(layer, *args, **options)
            return hidden if self._lengths is None else ends(hidden, self._lengths)

        swap(layer, __call__=call)

    @contextmanager
    def only(self, lengths: Sequence[int]) -> Iterator[None]:
        """The forward pass gives the logits (rows, 1, vocabulary) after each row's first `lengths` positions."""
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None
