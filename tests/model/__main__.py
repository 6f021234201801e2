"""`make model-check`: every state, as long as it takes."""

import argparse
import logging
import sys

from . import liveness
from .explore import ViolationError, explore
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
    world = World(arguments.ranks, arguments.faults, arguments.budget, kinds=arguments.kinds)
    print(f"{world.size} ranks, up to {world.faults} faults, budget of {world.budget} restarts", flush=True)
    try:
        graph = explore(world, lambda line: print(line, flush=True))
        print(f"safety holds in every state: {graph}; now liveness", flush=True)
        print(f"a good state is always reached: {liveness.check(graph)} of them are good")
    except ViolationError as violation:
        print(violation)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
