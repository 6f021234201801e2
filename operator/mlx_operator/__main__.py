"""`python -m mlx_operator`."""

import asyncio
import gc
import logging
import os
import signal
import sys

# PID 1 is not ended by a signal that it does not handle: one that came during the imports would be lost, and the pod
# would stay for its whole grace period. Nothing has begun that had to end in good order.
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

from mlx_operator.decide.plan import plan  # noqa: E402
from mlx_operator.errors import HostError, StartError  # noqa: E402
from mlx_operator.logs import configure, decision  # noqa: E402
from mlx_operator.main import Process  # noqa: E402
from mlx_operator.options import OptionError, parse  # noqa: E402


def main() -> int:
    """Run the operator; returns the exit code."""
    try:
        options = parse(sys.argv[1:])
    except OptionError as error:
        print(f"mlx-operator: {error}", file=sys.stderr)
        return 2
    configure(options.log_level, options.log_format)
    gc.freeze()  # what was imported stays: no collection has to look at it again

    async def run() -> int:
        return await Process(options, plan).run()

    try:
        return asyncio.run(run())
    except StartError as error:
        decision("cannot start", level=logging.ERROR, why=str(error))
        return 1
    except HostError as error:
        decision("the watches ended, exiting", level=logging.ERROR, why=str(error))
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
