"""How fast a group answers, beside mlx_lm.server on the same weights."""
