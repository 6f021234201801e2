"""The prefix cache against a plain list of what it holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_runner.engine.prefix_cache import MIN_POSITIONS, PrefixCache, budget

M = MIN_POSITIONS


def tokens(start: int, count: int) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


sequences = st.lists(st.integers(0, 1), max_size=6).flatmap(
    lambda branch: st.integers(0, 3 * M).map(lambda more: tuple([7] * M + branch * M + [9] * more))
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12 * M), st.lists(st.tuples(st.booleans(), sequences), max_size=25))
def test_the_longest_common_prefix_is_found_and_the_capacity_kept(
    capacity: int, steps: list[tuple[bool, tuple[int, ...]]]
) -> None:
    cache = PrefixCache(capacity)
    held: dict[int, tuple[int, ...]] = {}
    for keep, sequence in steps:
        if keep:
            change = cache.remember(sequence)
            if change is not None:
                for entry in change.forget:
                    del held[entry]
                assert change.entry not in held
                held[change.entry] = sequence
        else:
            hit = cache.find(sequence)
            best = max((common(sequence[:-1], other) for other in held.values()), default=0)
            assert (hit.positions if hit else 0) == (best if best >= M else 0)
            if hit:
                assert held[hit.entry][: hit.positions] == sequence[: hit.positions]
        assert cache.positions == sum(len(sequence) for sequence in held.values()) <= capacity


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    cache = PrefixCache(100)
    cache.remember(tokens(0, 40))
    hit = cache.find(tokens(0, 40))
    assert hit is not None
    assert hit.positions == 39


def test_a_sequence_that_continues_another_takes_its_place() -> None:
    cache = PrefixCache(1000)
    first = cache.remember(tokens(0, 40))
    assert first is not None
    longer = cache.remember(tokens(0, 60))
    assert longer is not None
    assert longer.forget == (first.entry,)
    assert cache.remember(tokens(0, 50)) is None, "what is held already"
    assert cache.positions == 60


def test_the_least_recently_used_goes_first() -> None:
    cache = PrefixCache(100)
    old, used = cache.remember(tokens(0, 40)), cache.remember(tokens(100, 40))
    assert old is not None and used is not None
    assert cache.find(tokens(0, 30)) is not None
    third = cache.remember(tokens(200, 40))
    assert third is not None
    assert third.forget == (used.entry,)


def test_nothing_is_kept_without_room_or_for_too_little() -> None:
    assert PrefixCache(0).remember(tokens(0, 40)) is None
    assert PrefixCache(39).remember(tokens(0, 40)) is None
    cache = PrefixCache(1000)
    assert cache.remember(tokens(0, M - 1)) is None
    cache.remember(tokens(0, 40))
    assert cache.find(tokens(0, M)) is None, "one token less than is worth it can be reused"


GIB = 1024**3


@pytest.mark.parametrize(
    ("asked", "limits", "expected"),
    [
        (0, [GIB], 0),
        (5, [GIB], 5),
        (2 * GIB, [None], 2 * GIB),
        (None, [GIB // 2], GIB // 32),
        (None, [2 * GIB, GIB // 2, None], GIB // 32),
        (None, [64 * GIB], GIB),
        (None, [None], GIB // 4),
    ],
)
def test_without_a_size_a_part_of_the_least_memory_limit_is_used(
    asked: int | None, limits: list[int | None], expected: int
) -> None:
    assert budget(asked, limits) == expected
