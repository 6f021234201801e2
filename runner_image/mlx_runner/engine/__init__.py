"""The engine: holds MLX, peers and weights; a child of the supervisor that may be killed at any time."""
