"""From a request to a row: prompt, limits, sampling, grammar. Everything that can be wrong with it is found here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_runner.channel import Generate, Load, Tokenize

from . import tools
from .answer import AnswerText
from .grammar import GrammarError, Grammars, Matcher
from .sampler import Parameters, RowSampler
from .text import PromptError, Tokenizer

UNSUPPORTED = "unsupported_parameter"
_OURS = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages"}
    | {"max_length", "padding", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"}
)
"""Arguments of the template's renderer, which are no variables of a template."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of a request, in tokens."""

    context: int
    answer: int | None
    measured: bool = False
    """The context follows from the memory that there was at this load."""

    @classmethod
    def of(cls, load: Load, model_context: int) -> "Limits":
        """What the spec says, or the model's own limit."""
        measured = load.context_length is None
        return cls(load.context_length or model_context, load.max_tokens, measured)

    def max_tokens(self, asked: int | None, prompt: int) -> int:
        """Tokens of an answer: what was asked for or fits, up to the limit."""
        wanted = asked if asked is not None else self.context - prompt
        return min(wanted, self.answer) if self.answer is not None else wanted


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be answered."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampler: RowSampler
    text: AnswerText
    grammar: Matcher | None


class Preparer:
    """Prepares the requests of one model."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits) -> None:
        self.limits = limits
        self._tokenizer = tokenizer
        self._grammars = Grammars(tokenizer.serialized, tokenizer.vocabulary, tokenizer.eos, ids=tokenizer.ids)

    def prepare(self, request: Generate) -> Prepared:
        """Check a request and turn it into tokens.

        Raises:
            PromptError: it asks for what this model or its limits do not allow.
        """
        self._check(request)
        prompt, max_tokens = self._prompt(request)
        grammar = self._grammar(request, prompt)
        sampler = RowSampler.of(_parameters(request), prompt, grammar)
        return Prepared(prompt, max_tokens, sampler, AnswerText(self._tokenizer, request, prompt), grammar)

    def tokens(self, asked: Tokenize) -> tuple[int, ...]:
        """The tokens of a prompt or of a conversation.

        Raises:
            PromptError: the model has no chat template, or its template does not take these messages.
        """
        if asked.messages is None:
            return self._tokenizer.complete(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
        self._check_options(asked.template_options)
        self._check_tools(asked.tools)
        return self._tokenizer.chat(
            asked.messages, asked.tools, asked.template_options, add_generation_prompt=asked.add_generation_prompt
        )

    # -- what the model must know
    def _check(self, request: Generate) -> None:
        self._tokenizer.check((token for token, _ in request.logit_bias), "logit_bias")
        self._check_options(request.template_options)
        self._check_tools(request.tools)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name in options:
            if name in _OURS or not self._tokenizer.takes(name):
                param = f"chat_template_kwargs.{name}"
                message = f"{param} is not supported: the model's chat template has no such variable"
                raise PromptError(message, code=UNSUPPORTED, param=param)

    def _check_tools(self, given: tuple[dict[str, Any], ...]) -> None:
        if given and self._tokenizer.tools is None:
            raise PromptError(
                "tools are not supported: the model's chat template has no form for tool calls that is known here",
                code=UNSUPPORTED,
                param="tools",
            )

    def _options(self, request: Generate) -> dict[str, Any]:
        """Variables of the chat template."""
        effort = request.reasoning_effort
        if effort is None:
            return request.template_options
        if self._tokenizer.takes("reasoning_effort"):
            return {"reasoning_effort": effort, **request.template_options}
        if effort == "none" and self._tokenizer.takes("enable_thinking"):
            return {"enable_thinking": False, **request.template_options}
        raise PromptError(
            f"reasoning_effort={effort!r} is not supported: the model's chat template knows no such levels",
            code=UNSUPPORTED,
            param="reasoning_effort",
        )

    # -- tokens
    def _prompt(self, request: Generate) -> tuple[tuple[int, ...], int]:
        param = "prompt" if request.messages is None else "messages"
        if request.messages is not None:
            prompt = self._tokenizer.chat(request.messages, request.tools, self._options(request))
        else:
            prompt = self._tokenizer.complete(request.prompt if request.prompt is not None else "")
        if not prompt:
            raise PromptError(f"{param} holds no text: at least one token is needed", param=param)
        max_tokens = self.limits.max_tokens(request.max_tokens, len(prompt))
        needed, context = len(prompt) + max_tokens, self.limits.context
        # One row has its place whatever it takes (`Scheduler._fits`), and this one had it in the same memory before.
        kept = request.accepted and self.limits.measured
        if (needed > context and not kept) or max_tokens < 1:
            asked = f"{max_tokens} in the answer" if max_tokens > 0 else "at least one in the answer"
            raise PromptError(
                f"the model's context holds {context} tokens; this request needs {len(prompt)} in the {param} "
                f"and {asked}: shorten the {param} or lower max_tokens",
                code="context_length_exceeded",
                param=param,
            )
        return prompt, max_tokens

    # -- grammars
    def _grammar(self, request: Generate, prompt: tuple[int, ...]) -> Matcher | None:
        if request.json_schema is None and request.tool_choice != "required":
            return None
        thinking = self._tokenizer.thinking
        # What the model thinks is free: the grammar is for the answer.
        after = thinking.end_tokens if thinking is not None and thinking.open_at_end(prompt) else ()
        if request.tool_choice == "required":
            return self._calls(request, after)
        try:
            return self._grammars.json(request.json_schema or {}, after)
        except GrammarError as error:
            raise PromptError(f"response_format: {error}", param="response_format") from error

    def _calls(self, request: Generate, after: tuple[int, ...]) -> Matcher:
        form = self._tokenizer.tools
        if form is None or not tools.forcible(form):
            raise PromptError(
                "tool_choice is not supported for this model beyond auto and none: it does not write its tool calls "
                "as JSON, so none can be forced",
                code=UNSUPPORTED,
                param="tool_choice",
            )
        named = [tool for tool in request.tools if request.tool_name in (None, tool["function"]["name"])]
        many = request.parallel_tool_calls and request.tool_name is None
        token_of = self._tokenizer.token_of
        try:
            lark = tools.forced(self._grammars, form, named, many=many, token_of=token_of)
            return self._grammars.lark(lark, after)
        except GrammarError as error:
            raise PromptError(f"tools: {error}", param="tools") from error


def _parameters(request: Generate) -> Parameters:
    return Parameters(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        bias=request.logit_bias,
        presence=request.presence_penalty,
        frequency=request.frequency_penalty,
        repetition=request.repetition_penalty,
        logprobs=request.logprobs,
    )
