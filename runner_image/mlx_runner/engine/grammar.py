"""Structured output: grammars that say which token may come next. The work is llguidance's.

Only rank 0 has them. A grammar is compiled in the text thread; the loop asks it for a mask and tells it each token.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_COMPACT = {"whitespace_flexible": False}
"""A small model would fill its budget with white space and never close."""


class GrammarError(Exception):
    """There is no such grammar; the text is the library's, for the client."""


class Grammars:
    """Compiles grammars for one tokenizer."""

    def __init__(
        self,
        tokenizer: Callable[[], str | None],
        vocabulary: int,
        eos: frozenset[int],
        *,
        ids: Callable[[], int] = lambda: 0,
    ) -> None:
        """For a model with a `vocabulary` of so many tokens.

        Args:
            tokenizer: gives the text of tokenizer.json; None where the model has no such tokenizer.
            vocabulary: of the model.
            eos: tokens that end an answer.
            ids: gives the number of the tokenizer's token ids, which may be more than the model's.
        """
        self._serialized = tokenizer
        self._size = vocabulary
        self._eos = sorted(eos)
        self._ids = ids

    @functools.cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer  # 50 ms of import, and of work for a large vocabulary: only where it is used

        text = self._serialized()
        if text is None:
            raise GrammarError("this model's tokenizer is none that structured output works with")
        try:
            # Without eos_token it would take the first token with a name of that kind, which is not the model's.
            return LLTokenizer(text, n_vocab=max(self._size, self._ids()), eos_token=self._eos)
        except ValueError as error:
            raise GrammarError(f"structured output does not work with this model's tokenizer: {error}") from error

    def json(self, schema: Mapping[str, Any], after: Sequence[int] = ()) -> "Matcher":
        """JSON that follows a schema; restricts nothing before the tokens `after` have come.

        Raises:
            GrammarError: the schema is wrong, or uses what the library cannot do.
        """
        from llguidance import LLMatcher

        text = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=_COMPACT)
        return self._compile(text, after)

    def lark(self, grammar: str, after: Sequence[int] = ()) -> "Matcher":
        """Text of a grammar in llguidance's dialect of Lark.

        Raises:
            GrammarError: a part of it is wrong, such as a schema in it.
        """
        from llguidance import LLMatcher

        return self._compile(LLMatcher.grammar_from_lark(grammar), after)

    def literal(self, text: str, token: int | None) -> str:
        """A text in Lark: by its token where the library holds that for a special one, else by its characters."""
        if token is not None and self._tokenizer.is_special_token(token):
            return f"<[{token}]>"
        return json.dumps(text)

    def _compile(self, grammar: str, after: Sequence[int]) -> "Matcher":
        from llguidance import LLMatcher

        tokenizer = self._tokenizer
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()))
        return Matcher(matcher, after)


class Matcher:
    """The state of one answer's grammar; a `sampler.Constraint`. It belongs to the thread that uses it."""

    def __init__(self, matcher: "LLMatcher", after: Sequence[int] = ()) -> None:
        self.error: str | None = None
        """Why the library gave up, such as a grammar too complex for its limits. Any thread may read it: the library
        itself fails when it is asked while another thread computes."""
        self._matcher = matcher
        self._after = tuple(after)
        self._before: list[int] = []
        """The last tokens of what the grammar says nothing about."""

    @property
    def active(self) -> bool:
        """Whether it restricts the next token."""
        return not self._after and not self._matcher.is_stopped()

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return not self._after and self._matcher.is_stopped()

    def allowed(self, vocabulary: int) -> Any:
        """A numpy array of booleans, one for each token id; those beyond the tokenizer's are not allowed."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        self._note_error()
        mask = np.zeros(vocabulary, dtype=bool)
        count = min(vocabulary, len(bits))
        mask[:count] = bits[:count]
        if not mask.any():
            mask[:] = True  # an error of the library, told by `error`: the row ends with whatever comes
        return mask

    def accept(self, token: int) -> None:
        """This token was chosen."""
        if not self._after:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
                self._note_error()
            return
        self._before = [*self._before, token][-len(self._after) :]
        if tuple(self._before) == self._after:
            self._after = ()

    def _note_error(self) -> None:
        if self._matcher.is_error():
            self.error = _first_line(self._matcher.get_error())


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]
