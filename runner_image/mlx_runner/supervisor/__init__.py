"""The supervisor: PID 1 of a runner pod. It owns the state machine and its children, and never imports MLX."""
