"""Sampling: a row's token depends on its own logits, parameters, seed and position only."""

import mlx.core as mx
import pytest

from mlx_runner.engine.sampler import Choice, key, sample


def logits(rows: int, vocabulary: int = 64) -> mx.array:
    return mx.random.normal((rows, vocabulary), key=mx.random.key(5)) * 3


def test_temperature_0_takes_the_most_likely_token() -> None:
    table = logits(4)
    choices = [Choice(0.0, 1.0, 9, position) for position in range(4)]
    assert sample(table, choices) == mx.argmax(table, axis=-1).tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_a_row_draws_the_same_alone_and_in_any_company(top_p: float) -> None:
    table = logits(6)
    choices = [
        Choice(1.2, top_p, 11, 4),
        Choice(0.0, 1.0, 0, 4),
        Choice(0.7, 0.5, 12, 9),
        Choice(2.0, 1.0, 13, 1),
        Choice(1.0, 0.1, 14, 2),
        Choice(1.0, 1.0, 2**40 + 3, 2),
    ]
    together = sample(table, choices)
    for row, choice in enumerate(choices):
        assert sample(table[row : row + 1], [choice]) == [together[row]]
    assert sample(table[::-1], choices[::-1]) == together[::-1]


def test_seed_and_position_change_what_is_drawn() -> None:
    table = mx.zeros((1, 1000))
    drawn = {sample(table, [Choice(1.0, 1.0, seed, position)])[0] for seed in range(5) for position in range(5)}
    assert len(drawn) > 20


def test_top_p_keeps_the_smallest_set_of_tokens_that_reaches_it() -> None:
    table = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))

    def drawn(top_p: float) -> set[int]:
        return {sample(table, [Choice(1.0, top_p, 1, position)])[0] for position in range(200)}

    assert drawn(0.4) == {0}
    assert drawn(0.75) == {0, 1}
    assert drawn(0.9) == {0, 1, 2}
    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(0.0) == {0}


def test_draws_follow_the_probabilities() -> None:
    table = mx.broadcast_to(mx.log(mx.array([0.6, 0.3, 0.1])), (3000, 3))
    drawn = sample(table, [Choice(1.0, 1.0, 3, position) for position in range(3000)])
    shares = [drawn.count(token) / 3000 for token in range(3)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.04)


def test_a_key_is_two_words_of_32_bits() -> None:
    assert key(Choice(1.0, 1.0, 2**63 + 5, 2**33 + 1)) == ((2**31) ^ 5, 1)
    assert key(Choice(1.0, 1.0, -1, 0)) == (0, 0)
