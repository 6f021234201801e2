"""Frames on the wire: integers in, the same frame out, and nothing else is accepted."""

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_runner.engine import frames
from mlx_runner.engine.frames import Frame, FrameError

numbers = st.integers(0, 2**31)
tuples = st.lists(numbers, max_size=5).map(tuple)
operations = st.one_of(
    st.lists(st.tuples(numbers, tuples), max_size=3).map(
        lambda rows: frames.PrefillBatch(tuple(uid for uid, _ in rows), tuple(prompt for _, prompt in rows))
    ),
    st.builds(frames.PrefillChunk, numbers, tuples),
    st.builds(frames.Join, numbers),
    st.builds(frames.Keep, tuples),
    st.builds(frames.Drop, numbers),
    st.builds(frames.Step, tuples),
    st.builds(frames.FirstStep, tuples),
    st.builds(frames.WarmedUp),
    st.builds(frames.ClearCache),
    st.builds(frames.Goodbye),
    st.builds(frames.Take, numbers, numbers, numbers),
    st.builds(frames.Save, numbers, numbers),
    st.builds(frames.Forget, numbers),
)


@given(st.builds(Frame, numbers, numbers, st.lists(operations, max_size=4).map(tuple), numbers))
def test_a_frame_comes_out_as_it_went_in(frame: Frame) -> None:
    assert frames.decode(frames.encode(frame)) == frame


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "text",
        [],
        [1, 2],
        [1, 2, 3],
        [1, 2, []],
        [1, 2, 0, 3],
        [1, 2, "0", []],
        [1, 2, 0, [[99]]],
        [1, 2, 0, [[5]]],
        [1, 2, 0, [[5, [1.5]]]],
        [1, 2, 0, [[5, ["a"]]]],
        [1, 2, 0, [[5, [True]]]],
        [1, 2, 0, [[5, [[1]]]]],
        [1, 2, 0, [[0, [1, 2], [[3]]]]],
        [1, 2, 0, [[9, 1, 2]]],
        [1, 2, 0, [{"a": 1}]],
        [1, 2, 0, [[5, [[[[[[1]]]]]]]]],
        {"epoch": 1},
    ],
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(FrameError):
        frames.decode(msgpack.packb(value))


@given(st.binary(max_size=60))
def test_noise_is_refused_or_a_frame_and_never_anything_else(raw: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert isinstance(frames.decode(raw), Frame)


def test_a_frame_that_is_too_big_is_not_sent() -> None:
    with pytest.raises(FrameError, match="larger than"):
        frames.encode(Frame(1, 1, (frames.Step((2**31,) * (4 * 1024 * 1024)),)))


def test_the_step_of_a_frame_is_its_last_operation() -> None:
    step = frames.Step((1,))
    assert Frame(1, 1, (frames.Join(2), step)).step == step
    assert Frame(1, 1, (frames.Join(2),)).step is None
    assert Frame(1, 1, ()).step is None
