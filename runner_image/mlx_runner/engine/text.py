"""Text in and out of the model: chat template, tokens, the end of a sequence. Runs in rank 0's text thread."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_operator_api.conditions import Reason

from .failures import EngineError

_REPLACEMENT = "\ufffd"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "tiktoken.model", "vocab.json", "vocab.txt")
"""Files of which a tokenizer needs one."""


class PromptError(Exception):
    """The prompt cannot be turned into tokens; the text is for the client."""

    def __init__(self, message: str, *, code: str = "invalid_value", param: str) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes its tool calls: the markers around each, and mlx-lm's parser of what is between them."""

    name: str
    """Of the parser's module in mlx-lm, such as `json_tools`."""
    start: str
    end: str
    """Empty where a call goes on to the end of the answer."""
    parse: Callable[[str, Any], Any]


@dataclass(frozen=True, slots=True)
class Thinking:
    """The markers around a model's reasoning, as text and as tokens."""

    start: str
    end: str
    start_tokens: tuple[int, ...]
    end_tokens: tuple[int, ...]

    def open_at_end(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt ends within reasoning."""
        return _rfind(tokens, self.start_tokens) > _rfind(tokens, self.end_tokens)


class Tokenizer:
    """A model's tokenizer and chat template."""

    def __init__(
        self,
        wrapped: Any,
        vocabulary: int,
        eos: frozenset[int],
        *,
        special: frozenset[int] = frozenset(),
        thinking: Thinking | None = None,
        tools: ToolFormat | None = None,
    ) -> None:
        self._wrapped = wrapped
        self.vocabulary = vocabulary
        self.eos = eos
        self.special = special
        """Tokens whose text is no part of an answer."""
        self.thinking = thinking
        self.tools = tools
        template = getattr(wrapped, "chat_template", None)
        self._template = json.dumps(template) if template is not None else ""

    def takes(self, variable: str) -> bool:
        """Whether the chat template knows a variable."""
        return re.search(rf"\b{re.escape(variable)}\b", self._template) is not None

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the answer.

        Raises:
            PromptError: the model has no chat template, its template does not take these messages, or they hold tokens
                that the model does not have.
        """
        if not self._wrapped.has_chat_template:
            raise PromptError("this model has no chat template: use /v1/completions", param="messages")
        given = {**(options or {}), **({"tools": list(tools)} if tools else {})}
        try:
            ids = self._wrapped.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, **given
            )
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise PromptError(f"the model's chat template refused the messages: {first}", param="messages") from error
        self.check(ids, "messages")
        return tuple(ids)

    def complete(self, prompt: str | tuple[int, ...], *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a completion's prompt.

        Raises:
            PromptError: it holds tokens that the model does not have.
        """
        if isinstance(prompt, str):
            given = {} if add_special_tokens else {"add_special_tokens": False}
            try:
                prompt = tuple(self._wrapped.encode(prompt, **given))
            except Exception as error:  # half a surrogate pair, for one: the client's mistake
                raise PromptError(f"the prompt cannot be tokenized: {error}", param="prompt") from error
        self.check(prompt, "prompt")
        return prompt

    def check(self, tokens: Iterable[int], param: str) -> None:
        """Whether the model has these tokens; a tokenizer may have more than the model.

        Raises:
            PromptError: it has not.
        """
        wrong = next((token for token in tokens if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            message = f"token id {wrong} is not in the model's vocabulary of {self.vocabulary}"
            raise PromptError(message, param=param)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special ones included."""
        text: str = self._wrapped.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def token_of(self, text: str) -> int | None:
        """The token that a text is by itself, if it is one."""
        found = self._wrapped.get_vocab().get(text)
        return None if found is None else int(found)

    def ids(self) -> int:
        """One more than its highest token id."""
        return _ids(self._wrapped)

    def serialized(self) -> str | None:
        """The text of its tokenizer.json; None where it has none."""
        backend = getattr(self._wrapped, "backend_tokenizer", None)
        return None if backend is None else str(backend.to_str())


def load_tokenizer(path: Path, config: dict[str, Any]) -> Tokenizer:
    """Read the tokenizer of a model.

    Raises:
        EngineError: it is missing or damaged.
    """
    if not any(next(path.glob(pattern), None) for pattern in _VOCABULARIES):
        # transformers would make up an empty one.
        message = f"{path} has no tokenizer: none of {', '.join(_VOCABULARIES)}"
        raise EngineError(Reason.MODEL_CORRUPT, message)
    from mlx_lm.utils import load_tokenizer as load  # after the environment is set (imports.py)

    try:
        wrapped = load(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # the library raises what its parsers raise
        found = ", ".join(sorted(file.name for file in path.glob("tokenizer*")))
        first = str(error).strip().split("\n")[0]
        message = f"the tokenizer in {path} cannot be read ({found}): {type(error).__name__}: {first}"
        raise EngineError(Reason.MODEL_CORRUPT, message) from error
    added = getattr(wrapped, "added_tokens_decoder", {})
    return Tokenizer(
        wrapped,
        int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or _ids(wrapped)),
        frozenset(int(token) for token in wrapped.eos_token_ids),
        special=frozenset(wrapped.all_special_ids) | {token for token, said in added.items() if said.special},
        thinking=_thinking(wrapped),
        tools=_tools(wrapped),
    )


def _ids(wrapped: Any) -> int:
    return max((int(token) for token in wrapped.get_vocab().values()), default=-1) + 1


def _thinking(wrapped: Any) -> Thinking | None:
    if not wrapped.has_thinking:
        return None
    return Thinking(wrapped.think_start, wrapped.think_end, wrapped.think_start_tokens, wrapped.think_end_tokens)


def _tools(wrapped: Any) -> ToolFormat | None:
    """As mlx-lm found it from the chat template, or as tokenizer_config.json names it."""
    if not wrapped.has_tool_calling:
        return None
    name = wrapped.init_kwargs["tool_parser_type"]
    return ToolFormat(name, wrapped.tool_call_start, wrapped.tool_call_end, wrapped.tool_parser)


def _rfind(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    size = len(wanted)
    return next((at for at in range(len(tokens) - size, -1, -1) if tuple(tokens[at : at + size]) == tuple(wanted)), -1)


class Detokenizer:
    """Text of a growing answer: given out as soon as later tokens cannot change it.

    A token may hold a part of a character, and its text may depend on the token before it; so each piece is the
    difference of two decodings that begin at the last place where the text was whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = 0
        self._given = 0

    def add(self, token: int) -> str:
        """The text that is certain with this token."""
        self._tokens.append(token)
        before, now = self._decode()
        if now.endswith(_REPLACEMENT):
            return ""
        self._begin, self._given = self._given, len(self._tokens)
        return now[len(before) :]

    def flush(self) -> str:
        """The rest, whatever it is worth."""
        before, now = self._decode()
        self._begin = self._given = len(self._tokens)
        return now[len(before) :]

    def _decode(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._tokens[self._begin : self._given])
        return before, self._tokenizer.decode(self._tokens[self._begin :])


class StopStrings:
    """Ends a text before the first of some strings; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What may be given out now, and whether a stop string was found (the rest is dropped)."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            given, self._held = self._held[: min(found)], ""
            return given, True
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        given, self._held = self._held[:cut], self._held[cut:]
        return given, False

    def flush(self) -> str:
        """What was held back: no stop string came."""
        given, self._held = self._held, ""
        return given


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
