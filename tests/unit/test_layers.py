"""Which rank holds which layers: all of them, each once, in a row, by a rule that every party follows by itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_operator_api.layers import TooFewLayersError, split

GIB = 1 << 30


@pytest.mark.parametrize(
    ("total", "limits", "expected"),
    [
        (4, (), ["2-3", "0-1"]),
        (5, (), ["3-4", "0-2"]),
        (24, (GIB, GIB), ["12-23", "0-11"]),
        (24, (GIB, None), ["12-23", "0-11"]),
        (24, (0, GIB), ["12-23", "0-11"]),
        (24, (GIB, 2 * GIB), ["16-23", "0-15"]),
        (24, (3 * GIB, GIB), ["6-23", "0-5"]),
        (4, (GIB, 100 * GIB), ["3-3", "0-2"]),
    ],
)
def test_layers_go_by_memory_where_it_is_known_and_differs(
    total: int, limits: tuple[int | None, ...], expected: list[str]
) -> None:
    assert [str(span) for span in split(total, 2, limits)] == expected


@settings(deadline=None)
@given(
    st.integers(1, 100).flatmap(
        lambda size: st.tuples(st.integers(size, 200), st.lists(st.integers(1, 64 * GIB), min_size=size, max_size=size))
    )
)
def test_every_layer_is_held_once_and_every_rank_holds_some_of_them(case: tuple[int, list[int]]) -> None:
    total, limits = case
    spans = split(total, len(limits), limits)
    held = [layer for span in reversed(spans) for layer in range(span.start, span.end)]
    assert held == list(range(total))
    assert all(span.start < span.end for span in spans)
    assert spans[-1].first and spans[0].last
    for span, limit in zip(spans, limits, strict=True):
        share = total * limit / sum(limits)
        # Nobody is far above its share but by the one layer that everybody has.
        assert span.end - span.start <= max(1.0, share + 1.0)


@pytest.mark.parametrize("limits", [(), (GIB, GIB, GIB)])
def test_fewer_layers_than_ranks_cannot_be_split(limits: tuple[int, ...]) -> None:
    with pytest.raises(TooFewLayersError, match="2 layers, too few for a pipeline of 3 ranks"):
        split(2, 3, limits)
