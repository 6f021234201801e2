"""`python -m mlx_runner`: the supervisor, PID 1 of a runner pod."""

import sys

from mlx_runner.supervisor.main import main

if __name__ == "__main__":
    sys.exit(main())
