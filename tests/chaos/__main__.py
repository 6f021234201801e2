"""`make soak`: random walks for as long as asked, or one fault of the table.

python -m tests.chaos --minutes 60 --seed 7      random walks
python -m tests.chaos --rounds 3 --seed 7        so many rounds
python -m tests.chaos --fault outage-2m          one row of tests/chaos/faults.py
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.apiserver.harness import install
from tests.chaos.drill import drill
from tests.chaos.faults import BY_HAND, FAULTS
from tests.chaos.walk import ALL_OUTAGES, walk
from tests.cluster.apiserver import ApiServer
from tests.cluster.waiting import tell

_ROWS = {row.id: row for row in (*FAULTS, *BY_HAND)}


def main() -> int:
    """Exit code 0 when everything held; otherwise what did not, and the way to see it again."""
    options = _options()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"seed {options.seed}, logs in {folder}", flush=True)
    rounds = [0]
    with ApiServer(folder / "server", controllers=False, progress=tell) as bare:
        install(bare)
        with ApiServer(folder / "server", progress=tell) as server:
            held = False
            try:
                asyncio.run(_run(server, folder, options, rounds))
                held = True
            finally:
                if not held:
                    what = f"--fault {options.fault}" if options.fault else f"--rounds {rounds[0] + 1}"
                    print(f'FAILED; again: make soak ARGS="--seed {options.seed} {what}"', file=sys.stderr)
    print(f"all held: seed {options.seed}, {rounds[0]} rounds")
    return 0


async def _run(server: ApiServer, folder: Path, options: argparse.Namespace, rounds: list[int]) -> None:
    work = folder / "work"
    work.mkdir()
    if options.fault:
        print(await drill(server, work, _ROWS[options.fault]))
        return
    until = time.monotonic() + options.minutes * 60

    def going_on(number: int) -> bool:
        rounds[0] = number
        return bool(number < options.rounds if options.rounds else time.monotonic() < until)

    await walk(server, work, options.seed, going_on=going_on, outages=ALL_OUTAGES, tell=_tell)


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("make soak", description="Faults of everything at once, for as long as asked.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--rounds", type=int, default=0, help="how many rounds, instead of minutes")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of what happens")  # noqa: S311
    parser.add_argument("--fault", choices=sorted(_ROWS), help="only this row of the table of faults")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
