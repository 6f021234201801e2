"""Text of an answer: given out as early as it is certain, never later taken back; stop strings are never shown."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_operator_api.tasks import Sharding
from mlx_runner import channel
from mlx_runner.channel import (
    Accepted,
    Cancel,
    Delta,
    Detokenize,
    Event,
    Finished,
    Generate,
    Load,
    Refused,
    Tokenize,
    Tokenized,
)
from mlx_runner.engine.prepare import Limits
from mlx_runner.engine.requests import CancelRow, Requests
from mlx_runner.engine.sampler import Parameters, RowSampler
from mlx_runner.engine.scheduler import Emission, Row
from mlx_runner.engine.text import Detokenizer, PromptError, StopStrings, Tokenizer

EOS = 256


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8: characters are cut anywhere."""

    has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return bytes(token for token in tokens if token < EOS).decode(errors="replace")

    def get_vocab(self) -> dict[str, int]:
        return {}


TOKENIZER = Tokenizer(Bytes(), 257, frozenset({EOS}))


@settings(deadline=None)
@given(st.text(max_size=40))
def test_the_pieces_are_the_text_and_no_piece_is_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in text.encode()]
    assert "".join([*pieces, detokenizer.flush()]) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.randoms())
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(text: str, stops: list[str], random: Any) -> None:
    ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    checker = StopStrings(stops)
    given_out, at, stopped = "", 0, False
    while at < len(text) and not stopped:
        size = random.randint(1, 3)
        piece, stopped = checker.add(text[at : at + size])
        given_out += piece
        at += size
        if ends:
            assert len(given_out) <= len(text)
    if not stopped:
        given_out += checker.flush()
    assert stopped == bool(ends)
    if ends:
        # With several stop strings the one that is complete first ends the text.
        assert not any(stop in given_out for stop in stops)
        assert text.startswith(given_out)
    else:
        assert given_out == text


def test_text_that_may_begin_a_stop_string_is_held_back_and_given_when_it_does_not() -> None:
    stops = StopStrings(["STOP"])
    assert stops.add("go ST") == ("go ", False)
    assert stops.add("O") == ("", False)
    assert stops.add("RE") == ("STORE", False)
    assert stops.add(" ST") == (" ", False)
    assert stops.flush() == "ST"


class Desk:
    """`Requests` without its thread."""

    def __init__(self, tokenizer: Tokenizer = TOKENIZER, **limits: Any) -> None:
        self.said: list[Event] = []
        self.submitted: list[Row | CancelRow] = []
        self.tokenizer = tokenizer
        self.limits = Limits(**{"context": 100, "answer": None, **limits})
        self.requests = Requests(tokenizer, self.limits, self.submitted.append, self.said.append)

    def ask(self, text: str = "abc", **options: Any) -> None:
        self.requests.handle(Generate(id="r", prompt=text, **options))

    def answer(self, *tokens: int, finish: str | None = None) -> None:
        last = len(tokens) - 1
        self.requests.handle(
            [
                Emission(1, token, finish if number == last else None)  # type: ignore[arg-type]
                for number, token in enumerate(tokens)
            ]
        )

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.said if isinstance(event, Delta))


def test_a_request_becomes_a_row_and_its_tokens_text() -> None:
    desk = Desk()
    desk.ask(max_tokens=9, temperature=0.5, top_p=0.9, seed=3)
    assert desk.said == [Accepted(id="r", prompt_tokens=3, max_tokens=9)]
    (row,) = desk.submitted
    assert row == Row(1, tuple(b"abc"), 9, RowSampler(Parameters(0.5, 0.9, seed=3), position=3))
    desk.answer(*"né".encode(), EOS, finish="stop")
    assert desk.text == "né"
    assert [event.tokens for event in desk.said if isinstance(event, Delta)][-1] == (EOS,)
    assert desk.said[-1] == Finished(id="r", finish_reason="stop", prompt_tokens=3, completion_tokens=4)


def test_a_stop_string_ends_the_request_once_and_frees_its_row() -> None:
    desk = Desk()
    desk.ask(stop=("END",))
    desk.answer(*b"wordENDmore")
    assert desk.text == "word"
    assert desk.submitted[1:] == [CancelRow(1)]
    assert desk.said[-1] == Finished(id="r", finish_reason="stop", prompt_tokens=3, completion_tokens=7)
    desk.requests.handle([Emission(1, finish="cancelled")])
    assert sum(isinstance(event, Finished) for event in desk.said) == 1


def test_an_answer_cut_in_the_middle_of_a_character_or_stop_string_gives_what_it_has() -> None:
    desk = Desk()
    desk.ask(stop=("END",))
    desk.answer(*b"wordEN", finish="length")
    assert desk.text == "wordEN"
    desk = Desk()
    desk.ask()
    desk.answer(*"né".encode()[:-1], finish="length")
    assert desk.text == "n\ufffd"


class Faulty(Bytes):
    """Chokes on one token, and on one text, as a bug would."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return super().encode(text)

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        if 0 in tokens:
            raise RuntimeError("a bug")
        return super().decode(tokens)


class Encoded(list[Event]):
    """What was said over the channel."""

    def append(self, event: Event) -> None:
        channel.encode(event)
        super().append(event)


def faulty_desk() -> Desk:
    desk = Desk(tokenizer=Tokenizer(Faulty(), 257, frozenset({EOS})))
    desk.said = Encoded()
    desk.requests = Requests(desk.tokenizer, desk.limits, desk.submitted.append, desk.said.append)
    return desk


def test_a_failure_with_one_request_ends_that_one_once_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    desk = faulty_desk()
    desk.ask()
    desk.requests.handle(Generate(id="other", prompt="x"))
    desk.requests.handle([Emission(1, 65), Emission(1, 0), Emission(2, 66), Emission(1, 67)])
    (refused,) = [event for event in desk.said if isinstance(event, Refused)]
    assert (refused.id, refused.status, refused.code) == ("r", 500, "internal_error")
    assert "RuntimeError" in refused.message
    assert desk.submitted[2:] == [CancelRow(1)]
    assert "RuntimeError: a bug" in capsys.readouterr().err
    desk.requests.handle([Emission(1, finish="cancelled"), Emission(2, EOS, "stop")])
    desk.requests.handle(Cancel(id="r"))
    assert [event.id for event in desk.said if isinstance(event, Refused | Finished)] == ["r", "other"]
    assert [event.text for event in desk.said if isinstance(event, Delta) and event.id == "other"] == ["B", ""]


def test_a_failure_at_the_end_of_an_answer_ends_it_once() -> None:
    desk = faulty_desk()
    desk.ask()
    desk.answer(65, 0, finish="length")
    assert [type(event) for event in desk.said] == [Accepted, Delta, Refused]
    desk = faulty_desk()
    desk.ask(resume=(65, 0))
    assert [type(event) for event in desk.said] == [Accepted, Refused]
    desk.requests.handle([Emission(1, finish="cancelled")])
    assert len(desk.said) == 2


def test_what_is_said_and_cannot_be_written_ends_its_request() -> None:
    class Half(Bytes):
        def decode(self, tokens: Sequence[int], **_: Any) -> str:
            return "\ud83d" * len(tokens)

    desk = faulty_desk()
    tokenizer = Tokenizer(Half(), 257, frozenset({EOS}))
    desk.requests = Requests(tokenizer, desk.limits, desk.submitted.append, desk.said.append)
    desk.ask()
    desk.answer(65)
    assert [type(event) for event in desk.said] == [Accepted, Refused]
    desk.requests.handle(Detokenize(id="q", tokens=(1,)))
    assert isinstance(desk.said[-1], Refused)
    assert (desk.said[-1].id, desk.said[-1].status) == ("q", 500)


@pytest.mark.parametrize(
    ("question", "param", "words"),
    [
        (Tokenize(id="q", prompt="abcd", return_token_strs=True), "return_token_strs", "leave return_token_strs out"),
        (Tokenize(id="q", prompt="a" * 200), "prompt", "in parts"),
        (Tokenize(id="q", messages=({"role": "user", "content": "a" * 200},)), "messages", "in parts"),
        (Detokenize(id="q", tokens=(65,) * 200), "tokens", "in parts"),
    ],
)
def test_an_answer_that_the_channel_does_not_carry_is_refused_with_what_helps(
    question: Tokenize | Detokenize, param: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wordy(Bytes):
        has_chat_template = True

        def encode(self, text: str, **_: Any) -> list[int]:
            return list(text.encode())

        def decode(self, tokens: Sequence[int], **_: Any) -> str:
            return super().decode(tokens) * (30 if len(tokens) == 1 else 1)

        def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> list[int]:
            return self.encode(messages[0]["content"])

    desk = faulty_desk()
    tokenizer = Tokenizer(Wordy(), 257, frozenset({EOS}))
    desk.requests = Requests(tokenizer, desk.limits, desk.submitted.append, desk.said.append)
    monkeypatch.setattr(channel, "MAX_EVENT_BYTES", 200)
    desk.requests.handle(question)
    (refused,) = desk.said
    assert isinstance(refused, Refused)
    assert (refused.status, refused.param) == (400, param)
    assert "200" in refused.message and words in refused.message
    desk.said.clear()
    desk.requests.handle(Tokenize(id="short", prompt="a"))
    assert [type(event) for event in desk.said] == [Tokenized]


def test_a_cancel_is_for_the_scheduler_and_ends_with_its_word() -> None:
    desk = Desk()
    desk.ask()
    desk.requests.handle(Cancel(id="r"))
    desk.requests.handle(Cancel(id="unknown"))
    assert desk.submitted[1:] == [CancelRow(1)]
    desk.requests.handle([Emission(1, finish="cancelled")])
    assert desk.said[-1] == Finished(id="r", finish_reason="cancelled", prompt_tokens=3, completion_tokens=0)


def run(desk: Desk, tokens: Sequence[int], max_tokens: int, **options: Any) -> list[Event]:
    """Ask, and be the scheduler; what was said of the answer."""
    desk.ask(max_tokens=max_tokens, **options)
    given_before = len(options.get("resume", ()))
    for number, token in enumerate(tokens[given_before:], start=given_before + 1):
        finish = "stop" if token == EOS else "length" if number == max_tokens else None
        if isinstance(desk.said[-1], Finished):
            break
        desk.answer(token, finish=finish)
    assert isinstance(desk.said[0], Accepted)
    return desk.said[1:]


@settings(deadline=None)
@given(
    text=st.text("ab\u00e9\U0001f600", max_size=12),
    stops=st.lists(st.text("ab\u00e9", min_size=1, max_size=3), max_size=2),
    ends=st.sampled_from(["eos", "length"]),
)
def test_an_answer_that_was_cut_anywhere_goes_on_to_the_same_text_and_the_same_end(
    text: str, stops: list[str], ends: str
) -> None:
    tokens = [*text.encode(), EOS]
    max_tokens = len(tokens) if ends == "eos" else max(1, len(tokens) - 1)
    undisturbed = run(Desk(), tokens, max_tokens, stop=tuple(stops))
    deltas = [event for event in undisturbed if isinstance(event, Delta)]
    assert isinstance(undisturbed[-1], Finished)
    for cut in range(len(deltas) + 1):
        given_tokens = tuple(token for delta in deltas[:cut] for token in delta.tokens)
        resumed = run(Desk(), tokens, max_tokens, stop=tuple(stops), resume=given_tokens)
        assert [*deltas[:cut], *resumed] == undisturbed, f"cut after {cut} tokens"


def test_the_row_of_a_resumed_answer_begins_after_the_tokens_that_were_given() -> None:
    desk = Desk()
    desk.ask(max_tokens=9, seed=3, resume=tuple(b"xy"))
    sampler = RowSampler(Parameters(1.0, seed=3), position=5)
    assert desk.submitted == [Row(1, tuple(b"abcxy"), 9, sampler, given=2)]
    assert desk.said == [Accepted(id="r", prompt_tokens=3, max_tokens=9)], "what the client has is not said again"


def test_more_tokens_than_the_limit_of_the_next_epoch_allows_end_the_answer_and_count() -> None:
    desk = Desk(answer=2)
    desk.ask(resume=tuple(b"wxyz"))
    assert not desk.submitted
    assert desk.said[-1] == Finished(id="r", finish_reason="length", prompt_tokens=3, completion_tokens=4)


def test_what_an_engine_accepted_is_not_refused_by_the_next_that_has_less_memory() -> None:
    first = Desk(measured=True)
    first.ask()
    (accepted,) = first.said
    assert accepted == Accepted(id="r", prompt_tokens=3, max_tokens=97)
    for resume in ((), tuple(b"xy")):
        less = Desk(measured=True, context=90)
        less.ask(max_tokens=97, accepted=True, resume=resume)
        (row,) = less.submitted
        assert isinstance(row, Row)
        assert (row.max_tokens, row.given, less.said) == (97, len(resume), [accepted])
    new = Desk(measured=True, context=90)
    new.ask(max_tokens=97)
    shortened = Desk(context=90)  # by whoever wrote the spec: with memory for no more
    shortened.ask(max_tokens=97, accepted=True)
    assert [type(event) for event in (*new.said, *shortened.said)] == [Refused, Refused]


def test_a_context_is_measured_where_the_spec_does_not_say_it() -> None:
    load = Load(
        path="/model", served_name="m", rank=0, world_size=1, sharding=Sharding.PIPELINE, max_concurrent_requests=1
    )
    assert Limits.of(load, 100) == Limits(100, None, measured=True)
    assert Limits.of(load.model_copy(update={"context_length": 50}), 100) == Limits(50, None)


@pytest.mark.parametrize(
    ("limits", "asked", "granted"),
    [({}, None, 97), ({}, 97, 97), ({"answer": 20}, None, 20), ({"answer": 20}, 50, 20), ({"answer": 20}, 5, 5)],
)
def test_max_tokens_is_what_was_asked_for_or_fits_up_to_the_servers_limit(
    limits: dict[str, Any], asked: int | None, granted: int
) -> None:
    desk = Desk(**limits)
    desk.ask(max_tokens=asked)
    (row,) = desk.submitted
    assert isinstance(row, Row)
    assert row.max_tokens == granted


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    desk = Desk()
    desk.ask(max_tokens=98)
    (refused,) = desk.said
    assert isinstance(refused, Refused)
    assert (refused.code, refused.param, refused.status) == ("context_length_exceeded", "prompt", 400)
    assert "holds 100 tokens" in refused.message and "needs 3 in the prompt and 98 in the answer" in refused.message
    assert not desk.submitted


def test_a_chat_without_a_template_is_told_what_to_use() -> None:
    desk = Desk()
    desk.requests.handle(Generate(id="r", messages=({"role": "user", "content": "x"},)))
    (refused,) = desk.said
    assert isinstance(refused, Refused)
    assert refused.param == "messages" and "/v1/completions" in refused.message


class Larger(Bytes):
    """A tokenizer with one token more than the model has."""

    has_chat_template = True

    def encode(self, text: str, **_: Any) -> list[int]:
        return [300 if letter == "!" else ord(letter) for letter in text]

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_: Any) -> list[int]:
        return self.encode(messages[0]["content"])


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (Generate(id="r", prompt="a!"), "prompt"),
        (Generate(id="r", messages=({"role": "user", "content": "a!"},)), "messages"),
        (Generate(id="r", prompt=(97, 300)), "prompt"),
        (Tokenize(id="r", prompt="a!"), "prompt"),
    ],
)
def test_a_token_that_the_model_does_not_have_is_refused_wherever_it_comes_from(
    asked: Generate | Tokenize, param: str
) -> None:
    desk = Desk(tokenizer=Tokenizer(Larger(), 257, frozenset({EOS})))
    desk.requests.handle(asked)
    (refused,) = desk.said
    assert isinstance(refused, Refused)
    assert (refused.status, refused.param) == (400, param)
    assert "300" in refused.message and "257" in refused.message


def test_what_the_tokenizer_chokes_on_is_the_clients_mistake() -> None:
    def choke(text: str) -> list[int]:
        raise UnicodeEncodeError("utf-8", text, 0, 1, "surrogates not allowed")

    tokenizer = Tokenizer(SimpleNamespace(encode=choke), 10, frozenset())
    with pytest.raises(PromptError, match="surrogates"):
        tokenizer.complete("\ud800")
