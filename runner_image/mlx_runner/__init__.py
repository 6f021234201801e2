"""The runner: a supervisor that can always tell the truth, and the MLX engine beside it."""
