"""`python -m mlx_runner.engine`, started by the supervisor with its end of the channel."""

from .main import main

main()
