"""`make test` shows what its layers print, whatever that is."""

import asyncio

from tests import layers


async def said(*chunks: bytes) -> list[str]:
    """The lines of a stream that brings these chunks and ends."""
    stream = asyncio.StreamReader()
    for chunk in chunks:
        stream.feed_data(chunk)
    stream.feed_eof()
    return [line async for line in layers.lines_of(stream)]


async def test_lines_are_told_one_by_one_and_the_last_one_without_its_end_too() -> None:
    assert await said(b"one\ntw", b"o\n\nthr", b"ee") == ["one", "two", "", "three"]
    assert await said(b"caf\xc3", b"\xa9 \xff\n") == ["café �"]
    assert await said() == []


async def test_a_line_of_any_length_does_not_end_the_layer() -> None:
    long = b"x" * (20 << 20)
    assert [len(line) for line in await said(long, b"\nshort\n")] == [len(long), 5]
