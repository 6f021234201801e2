"""Grammars: for tokenizers that are no twin of their model, and read from the thread that does not use them."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlx_runner.engine.grammar import GrammarError, Grammars, Matcher

LETTERS = ["<eos>", *'{}"ab:,0']


def serialized() -> str:
    """tokenizer.json of one with a token for each letter."""
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return str(tokenizer.to_str())


def grammars(text: str, *, vocabulary: int, ids: int) -> Grammars:
    return Grammars(lambda: text, vocabulary, frozenset({0}), ids=lambda: ids)


@pytest.mark.parametrize("vocabulary", [7, 9, 12])
def test_a_model_may_have_fewer_or_more_tokens_than_its_tokenizer(vocabulary: int) -> None:
    matcher = grammars(serialized(), vocabulary=vocabulary, ids=9).json({"type": "object"})
    allowed = matcher.allowed(vocabulary)
    assert (len(allowed), np.flatnonzero(allowed).tolist()) == (vocabulary, [LETTERS.index("{")])


def test_a_tokenizer_that_the_library_does_not_take_is_told() -> None:
    with pytest.raises(GrammarError, match="out of range"):
        Grammars(serialized, 9, frozenset({50}), ids=lambda: 9).json({"type": "object"})
    with pytest.raises(GrammarError, match="none that structured output works with"):
        Grammars(lambda: None, 9, frozenset({0}), ids=lambda: 9).json({"type": "object"})


class Owned:
    """A matcher that belongs to one thread: the library fails where another one looks at it at the wrong moment."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._failed = False

    def _mine(self) -> None:
        assert threading.get_ident() == self._owner, "Already mutably borrowed"

    def is_stopped(self) -> bool:
        self._mine()
        return self._failed

    def is_error(self) -> bool:
        self._mine()
        return self._failed

    def get_error(self) -> str:
        self._mine()
        return "too complex\nand more"

    def consume_token(self, token: int) -> bool:
        self._mine()
        self._failed = token == 1
        return not self._failed

    def compute_bitmask(self) -> bytes:
        self._mine()
        self._failed = True
        return bytes(4)


@pytest.mark.parametrize("use", [lambda matcher: matcher.accept(1), lambda matcher: matcher.allowed(8)])
def test_the_error_of_a_grammar_is_known_to_the_other_thread(use: Callable[[Matcher], Any]) -> None:
    matcher = Matcher(cast(LLMatcher, Owned()))
    with ThreadPoolExecutor(1) as other:
        matcher.accept(0)
        assert other.submit(lambda: matcher.error).result(30) is None
        use(matcher)
        assert other.submit(lambda: matcher.error).result(30) == "too complex"
