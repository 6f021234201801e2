"""`make model-check`: every state, as long as it takes."""

import argparse
import logging
import sys

from . import parts
from .world import KINDS, World


def main() -> int:
    """Explore and report; the exit code is 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description=__doc__)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--faults", type=int, default=2)
    parser.add_argument("--budget", type=int, default=1, help="spec.restartPolicy.maxRestarts")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="only these faults")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.faults == 1 and arguments.ranks > 1:
        ends = parts.one_fault(arguments.ranks, arguments.budget, arguments.kinds, told=True)
    else:
        world = World(arguments.ranks, arguments.faults, arguments.budget, kinds=arguments.kinds)
        ends = [parts.found(world, lambda line: print(line, flush=True))]
    for end in ends:
        print(end.text)
    return 0 if all(end.holds for end in ends) else 1


if __name__ == "__main__":
    sys.exit(main())
