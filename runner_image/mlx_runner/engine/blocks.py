"""Positions as mlx-lm's caches allocate them: in blocks."""

BLOCK = 256


def blocks(positions: int) -> int:
    """The positions that a cache has room for once it holds these."""
    return -(-positions // BLOCK) * BLOCK
