"""Sampling: a row's token depends on its own logits, parameters, seed and position only."""

import copy
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_runner.engine.sampler import Parameters, RowSampler, key, sample


def choice(temperature: float, top_p: float, seed: int, position: int, **others: Any) -> RowSampler:
    return RowSampler(Parameters(temperature, top_p, seed=seed, **others), position)


def logits(rows: int, vocabulary: int = 64) -> mx.array:
    return mx.random.normal((rows, vocabulary), key=mx.random.key(5)) * 3


def test_temperature_0_takes_the_most_likely_token() -> None:
    table = logits(4)
    choices = [choice(0.0, 1.0, 9, position) for position in range(4)]
    assert sample(table, choices) == mx.argmax(table, axis=-1).tolist()


def check_independence(table: mx.array, rows: list[RowSampler]) -> list[int]:
    """Each row draws the same alone, together, and in another order."""
    together = sample(table, copy.deepcopy(rows))
    for number, row in enumerate(rows):
        assert sample(table[number : number + 1], [copy.deepcopy(row)]) == [together[number]], number
    assert sample(table[::-1], copy.deepcopy(rows)[::-1]) == together[::-1]
    return together


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_row_draws_the_same_alone_and_in_any_company(top_p: float) -> None:
    table = logits(6)
    choices = [
        choice(1.2, top_p, 11, 4),
        choice(0.0, 1.0, 0, 4),
        choice(0.7, 0.5, 12, 9),
        choice(2.0, 1.0, 13, 1),
        choice(1.0, 0.1, 14, 2),
        choice(1.0, 1.0, 2**40 + 3, 2),
    ]
    check_independence(table, choices)


def test_seed_and_position_change_what_is_drawn() -> None:
    table = mx.zeros((1, 1000))
    drawn = {sample(table, [choice(1.0, 1.0, seed, position)])[0] for seed in range(5) for position in range(5)}
    assert len(drawn) > 20


def test_top_p_keeps_the_smallest_set_of_tokens_that_reaches_it() -> None:
    table = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))

    def drawn(top_p: float) -> set[int]:
        return {sample(table, [choice(1.0, top_p, 1, position)])[0] for position in range(200)}

    assert drawn(0.4) == {0}
    assert drawn(0.75) == {0, 1}
    assert drawn(0.9) == {0, 1, 2}
    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(0.0) == {0}


def test_draws_follow_the_probabilities() -> None:
    table = mx.broadcast_to(mx.log(mx.array([0.6, 0.3, 0.1])), (3000, 3))
    drawn = sample(table, [choice(1.0, 1.0, 3, position) for position in range(3000)])
    shares = [drawn.count(token) / 3000 for token in range(3)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.04)


def test_a_key_is_two_words_of_32_bits() -> None:
    assert key(choice(1.0, 1.0, 2**63 + 5, 2**33 + 1)) == ((2**31) ^ 5, 1)
    assert key(choice(1.0, 1.0, -1, 0)) == (0, 0)


FEATURES: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": 0.6, "top_k": 9},
    {"bias": ((3, 4.0), (5, -100.0))},
    {"presence": 1.5, "frequency": 0.5},
    {"repetition": 1.7},
    {"logprobs": 4},
]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FEATURES), st.sampled_from([0.0, 0.8, 1.5])), min_size=1, max_size=6))
def test_what_a_row_asks_for_changes_no_other(asked: list[tuple[dict[str, Any], float]]) -> None:
    rows = []
    for number, (features, temperature) in enumerate(asked):
        row = choice(temperature, features.get("top_p", 1.0), number, number, **without(features, "top_p"))
        row.seen, row.counts = frozenset({1, 2, 40}), {7: 2, 8: 1}
        rows.append(row)
    check_independence(logits(len(rows)), rows)


def without(features: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in features.items() if key != name}


def drawn(probabilities: list[float], **features: Any) -> set[int]:
    table = mx.log(mx.array([probabilities]))
    return {sample(table, [choice(1.0, 1.0, 1, position, **features)])[0] for position in range(200)}


def test_top_k_and_min_p_leave_out_the_less_likely() -> None:
    assert drawn([0.5, 0.3, 0.15, 0.05], top_k=1) == {0}
    assert drawn([0.5, 0.3, 0.15, 0.05], top_k=3) == {0, 1, 2}
    assert drawn([0.5, 0.3, 0.15, 0.05], top_k=400) == {0, 1, 2, 3}
    assert drawn([0.5, 0.3, 0.15, 0.05], min_p=0.5) == {0, 1}
    assert drawn([0.5, 0.3, 0.15, 0.05], min_p=1.0) == {0}


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    table = mx.log(mx.array([[0.4, 0.3, 0.2, 0.1]]))
    found = {sample(table, [choice(1.0, 0.55, 1, position, top_k=2)])[0] for position in range(200)}
    assert found == {0}, "0.4 of 0.7 is more than 0.55"


def test_bias_and_penalties_move_single_tokens() -> None:
    table = mx.array([[2.0, 1.9, -1.0, 0.5]])

    def best(counts: dict[int, int] | None = None, seen: frozenset[int] = frozenset(), **features: Any) -> int:
        row = choice(0.0, 1.0, 0, 0, **features)
        row.counts, row.seen = dict(counts or {}), seen
        return sample(table, [row])[0]

    assert best() == 0
    assert best(bias=((3, 2.0),)) == 3
    assert best(bias=((0, -100.0), (1, -100.0))) == 3
    assert best(bias=((99, 100.0),)) == 0, "an id beyond the table changes nothing"
    assert best({0: 1}, presence=0.2) == 1
    assert best({0: 3}, frequency=0.04) == 1
    assert best({0: 1}, frequency=0.04) == 0
    assert best(seen=frozenset({0}), repetition=1.5) == 1
    assert best(seen=frozenset({0}), presence=2.0) == 0, "only the answer counts for presence"
    assert best(seen=frozenset({2, 1, 3}), repetition=0.1) == 1


def test_a_row_remembers_what_it_was_given_and_a_replay_brings_it_to_the_same_state() -> None:
    parameters = Parameters(0.9, seed=4, presence=0.7, frequency=0.3, repetition=1.2, logprobs=1)
    table = logits(1, 16)
    row = RowSampler.of(parameters, (1, 2, 3))
    tokens = [sample(table, [row])[0] for _ in range(12)]
    again = RowSampler.of(parameters, (1, 2, 3))
    for token in tokens[:7]:
        again.accept(token)
    assert [sample(table, [again])[0] for _ in range(5)] == tokens[7:]
    assert (again.position, again.counts) == (row.position, row.counts)


def test_logprobs_are_the_models_own_whatever_was_drawn() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    table = mx.log(mx.array([probabilities, probabilities, probabilities]))
    rows = [
        choice(0.0, 1.0, 0, 0, logprobs=2, bias=((3, 50.0),)),
        choice(0.0, 1.0, 0, 0),
        choice(0.0, 1.0, 0, 0, logprobs=0),
    ]
    assert sample(table, rows) == [3, 0, 0]
    first = rows[0].logprobs
    assert first is not None and rows[1].logprobs is None and rows[2].logprobs is not None
    assert first.token == pytest.approx(math.log(0.05), abs=1e-5)
    assert [token for token, _ in first.top] == [0, 1]
    assert [value for _, value in first.top] == pytest.approx([math.log(0.5), math.log(0.3)], abs=1e-5)
    assert rows[2].logprobs.token == pytest.approx(math.log(0.5), abs=1e-5)
    assert rows[2].logprobs.top == ()


class Only:
    """A grammar of some tokens in turn."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)
        self.active = True

    @property
    def ended(self) -> bool:
        return not self.tokens

    def allowed(self, vocabulary: int) -> Any:
        mask = np.zeros(vocabulary, dtype=bool)
        mask[self.tokens[0]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self.tokens.pop(0)


def test_a_grammar_restricts_its_own_row_and_says_when_it_ends() -> None:
    table = logits(3)
    bound = [RowSampler(Parameters(temperature), constraint=Only(7, 9)) for temperature in (0.0, 1.3)]
    free = RowSampler()
    expected = [sample(table[2:], [RowSampler()])[0]] * 2
    assert [sample(table, [*bound, free]) for _ in range(2)] == [[7, 7, expected[0]], [9, 9, expected[1]]]
    assert [row.ended for row in (*bound, free)] == [True, True, False]
