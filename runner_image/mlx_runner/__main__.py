"""`python -m mlx_runner`: the supervisor, PID 1 of a runner pod."""

import os
import signal
import sys

# PID 1 is not ended by a signal that it does not handle: one that came during the imports would be lost, and the pod
# would stay for its whole grace period. Nothing has begun that had to end in good order.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

from mlx_runner.supervisor.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
