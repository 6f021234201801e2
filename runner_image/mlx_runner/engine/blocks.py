"""Positions as mlx-lm's caches allocate them: in blocks."""

import sys

BLOCK = 256


def blocks(positions: int) -> int:
    """The positions that a cache has room for once it holds these."""
    return -(-positions // BLOCK) * BLOCK


def rows_in(positions: int | None) -> int:
    """Short sequences that have room in so many positions; None: any number."""
    return sys.maxsize if positions is None else positions // BLOCK
