"""Text of requests: chat template, stop strings, limits, cancel."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlx_runner import channel

from . import tiny_models
from .conftest import LONG, PROMPTS, TOKENS, Reference
from .engine_ranks import Rank, Ranks, generate, running, wait_until


def rests(rank: Rank) -> bool:
    return rank.progress.read().phase == 0


def holds(rank: Rank, rows: int) -> bool:
    snapshot = rank.progress.read()
    return snapshot.rows >= rows and snapshot.cache_bytes > 0


def chat(request: str, *contents: str, role: str = "user", **options: Any) -> channel.Generate:
    messages = tuple({"role": role, "content": content} for content in contents)
    return channel.Generate(id=request, messages=messages, temperature=0.0, **options)


def test_a_chat_goes_through_the_models_template(single: Ranks) -> None:
    leader = single[0]
    leader.send(chat("chat", "the runner", max_tokens=4))
    accepted = leader.expect(channel.Accepted, where=lambda event: event.id == "chat")
    leader.answer("chat")
    text = "<|im_start|>user\nthe runner<|im_end|>\n<|im_start|>assistant\n"
    leader.send(channel.Generate(id="same", prompt=text, max_tokens=4, temperature=0.0))
    assert leader.expect(channel.Accepted, where=lambda event: event.id == "same") == accepted.model_copy(
        update={"id": "same"}
    )
    assert leader.answer("same").tokens == leader.answers["chat"].tokens


def refusal(ranks: Ranks, request: channel.Generate) -> channel.Refused:
    ranks[0].send(request)
    return ranks[0].expect(channel.Refused, where=lambda event: event.id == request.id)


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(single: Ranks) -> None:
    refused = refusal(single, generate("too-long", (5,) * 2040, 9))
    assert (refused.status, refused.code, refused.param) == (400, "context_length_exceeded", "prompt")
    assert all(number in refused.message for number in ("2048", "2040", "9")), refused.message


def test_a_prompt_that_fills_the_context_is_refused_without_max_tokens(single: Ranks) -> None:
    refused = refusal(single, channel.Generate(id="full", prompt=(5,) * 2048))
    assert refused.code == "context_length_exceeded"
    assert "at least one in the answer" in refused.message


@pytest.mark.parametrize(
    ("name", "request_", "param", "words"),
    [
        ("empty", channel.Generate(id="empty", prompt=""), "prompt", "at least one token"),
        ("vocabulary", channel.Generate(id="vocabulary", prompt=(5, 4000)), "prompt", "4000"),
        ("role", chat("role", "x", role="wizard"), "messages", "unknown role wizard"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_the_clients_mistake(
    single: Ranks, name: str, request_: channel.Generate, param: str, words: str
) -> None:
    refused = refusal(single, request_)
    assert (refused.status, refused.param) == (400, param)
    assert words in refused.message, name


def test_without_max_tokens_an_answer_fills_the_context_up_to_the_servers_limit(tmp_path: Path, tiny: Any) -> None:
    # The end-of-answer token never comes from this prompt before the limit: see the reference.
    with running(tmp_path, 1) as ranks:
        ranks.serve(tiny("qwen2"), max_tokens=30, context_length=64, max_concurrent_requests=2)
        leader = ranks[0]
        leader.send(channel.Generate(id="limit", prompt=PROMPTS[0], temperature=0.0))
        leader.send(channel.Generate(id="context", prompt=PROMPTS[3][:60], temperature=0.0))
        leader.send(channel.Generate(id="waits", prompt=PROMPTS[1], temperature=0.0, max_tokens=2))
        limit, context, waits = (leader.answer(name).finished for name in ("limit", "context", "waits"))
        assert limit is not None and context is not None and waits is not None
        assert (limit.completion_tokens, limit.finish_reason) == (30, "length")
        assert (context.completion_tokens, context.finish_reason) == (4, "length")
        assert waits.completion_tokens == 2
        # No place for the third: its first token came after one of the others was done.
        order = [event.id for event in leader.seen if isinstance(event, channel.Finished | channel.Delta)]
        first_end = next(i for i, e in enumerate(leader.seen) if isinstance(e, channel.Finished))
        first_word = next(i for i, e in enumerate(leader.seen) if isinstance(e, channel.Delta) and e.id == "waits")
        assert first_end < first_word, order
        refused = refusal(ranks, generate("above", (5,) * 60, 5))
        assert "64" in refused.message


def test_the_text_ends_before_a_stop_string_and_nothing_of_it_is_given_out(single: Ranks) -> None:
    leader = single[0]
    leader.send(generate("free", PROMPTS[0], TOKENS))
    text = leader.answer("free").text
    stop = text[9:13]
    leader.send(generate("stopped", PROMPTS[0], TOKENS, stop=(stop, "never")))
    answer = leader.answer("stopped")
    assert answer.text == text[: text.index(stop)]
    assert answer.finished is not None
    assert answer.finished.finish_reason == "stop"
    assert answer.finished.completion_tokens == len(answer.tokens) < TOKENS


def test_the_end_token_ends_an_answer_and_is_not_in_its_text(tmp_path: Path, tiny: Any, reference: Reference) -> None:
    # A model whose end token is one that the answer holds.
    free = reference("qwen2")[0]
    model = tiny_models.copy(tiny("qwen2"), tmp_path / "model")
    end = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    with running(tmp_path, 1) as ranks:
        ranks.serve(model)
        ranks[0].send(generate("ended", PROMPTS[0], TOKENS))
        answer = ranks[0].answer("ended")
        assert answer.tokens == free[: free.index(end) + 1]
        assert answer.finished is not None and answer.finished.finish_reason == "stop"
        ranks[0].send(generate("before", PROMPTS[0], free.index(end)))
        assert ranks[0].answer("before").text == answer.text


def test_cancelled_requests_leave_every_rank_wherever_they_are(pipeline: Ranks) -> None:
    leader = pipeline[0]
    leader.send(generate("stays", PROMPTS[0], 60))
    leader.expect(channel.Delta, where=lambda event: event.id == "stays")
    for number in range(10):  # eight places: some decode, some wait
        leader.send(generate(f"leaves-{number}", PROMPTS[5], 1500))
    leader.send(generate("prefills", PROMPTS[LONG] * 2, 100))
    leader.expect(channel.Delta, where=lambda event: event.id == "leaves-0")
    for rank in pipeline.ranks:
        wait_until(partial(holds, rank, 2), 20, f"rank {rank.rank} holds rows: {rank.progress.read()}")
    names = [*(f"leaves-{number}" for number in range(10)), "prefills"]
    for name in [*names, "nobody"]:
        leader.send(channel.Cancel(id=name))
    for name in names:
        finished = leader.answer(name).finished
        assert finished is not None and finished.finish_reason == "cancelled"
    assert len(leader.answer("stays").tokens) == 60
    for rank in pipeline.ranks:
        wait_until(partial(rests, rank), 20, f"rank {rank.rank} rests")
        assert rank.progress.read().rows == 0
