"""`python -m mlx_operator`."""

import asyncio
import gc
import logging
import sys

from mlx_operator.decide.plan import plan
from mlx_operator.errors import HostError, StartError
from mlx_operator.logs import configure, decision
from mlx_operator.main import Process
from mlx_operator.options import OptionError, parse


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
