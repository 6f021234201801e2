"""`/v1/responses`: what is streamed and what is told at the end are the same items."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_runner import channel
from mlx_runner.supervisor.openai_responses import parse_responses
from mlx_runner.supervisor.response_shapes import Response

Said = tuple[str, str]


def delta(reasoning: str, text: str) -> channel.Delta:
    return channel.Delta(id="r", text=text, reasoning=reasoning, tokens=(1,))


def finished(reason: Any) -> channel.Finished:
    return channel.Finished(id="r", finish_reason=reason, prompt_tokens=1, completion_tokens=1)


def shape() -> Response:
    return Response(parse_responses({"model": "m", "input": "x", "stream": True}))


def streamed(said: list[Said], reason: str = "stop") -> list[dict[str, Any]]:
    """The events of an answer, given as (reasoning, text) of each delta."""
    response = shape()
    events = response.opening()
    for one in said:
        events += response.chunk(0, delta(*one))
    response.rows[0].finished = finished(reason)
    return [*events, *response.closing(0), *response.ending()]


def whole(said: list[Said], reason: str = "stop") -> dict[str, Any]:
    response = shape()
    for one in said:
        response.rows[0].add(delta(*one))
    response.rows[0].finished = finished(reason)
    return response.whole()


def contents(output: list[dict[str, Any]]) -> list[Said]:
    return [(item["type"], item["content"][0]["text"]) for item in output]


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**item, "id": item["id"].rpartition("_")[2]} for item in output]


@pytest.mark.parametrize(
    ("said", "items"),
    [
        ([("", "\n"), ("think", ""), ("", "hi")], [("reasoning", "think"), ("message", "\nhi")]),
        ([("", "  "), ("", "hi"), ("", " ")], [("message", "  hi ")]),
        ([("", "\n")], [("message", "\n")]),
        ([("think", "")], [("reasoning", "think"), ("message", "")]),
        ([], [("message", "")]),
        ([("a", "b"), ("c", "d")], [("reasoning", "a"), ("message", "b"), ("reasoning", "c"), ("message", "d")]),
    ],
)
def test_nothing_is_lost_and_white_space_does_not_begin_a_message(said: list[Said], items: list[Said]) -> None:
    assert contents(streamed(said)[-1]["response"]["output"]) == items
    assert contents(whole(said)["output"]) == items


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["", "", "think"]), st.sampled_from(["", "\n", " ", "hi", " hi"])), max_size=8),
    st.sampled_from(["stop", "length"]),
)
def test_the_events_tell_the_items_of_the_whole(said: list[Said], reason: str) -> None:
    events = streamed(said, reason)
    output = events[-1]["response"]["output"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["item"] for event in done] == output
    added = [event for event in events if event["type"] == "response.output_item.added"]
    for numbered in (added, done):
        assert [event["output_index"] for event in numbered] == list(range(len(output)))
    assert [event["item"]["id"] for event in added] == [item["id"] for item in output]
    for number, item in enumerate(output):
        parts = [event for event in events if event.get("item_id") == item["id"]]
        assert {event["output_index"] for event in parts} == {number}
        text = "".join(event["delta"] for event in parts if event["type"].endswith(".delta"))
        assert text == item["content"][0]["text"]
        assert [event["text"] for event in parts if event["type"].endswith("text.done")] == [text]
    assert "".join(text for kind, text in contents(output) if kind == "message") == "".join(text for _, text in said)
    assert "".join(text for kind, text in contents(output) if kind == "reasoning") == "".join(one for one, _ in said)
    assert without_ids(whole(said, reason)["output"]) == without_ids(output)


def test_an_answer_that_is_cut_says_so_of_the_part_that_was_cut() -> None:
    def statuses(said: list[Said]) -> list[str]:
        return [item["status"] for item in whole(said, "length")["output"]]

    assert statuses([("think", ""), ("", "hi")]) == ["completed", "incomplete"]
    assert statuses([("think", "")]) == ["incomplete", "incomplete"]
    assert whole([("", "hi")], "length")["status"] == "incomplete"
