"""`make bench-operator`: many instances on a real API server, and what the operator costs it and itself.

python -m tests.scale [--instances 1000] [--kill 100] [--idle 60] [--seed N]
"""

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.apiserver.kubelet import python_path
from tests.cluster.deploy import NAMESPACE
from tests.cluster.waiting import tell
from tests.scale import report
from tests.scale.memory import Parts
from tests.scale.place import place
from tests.scale.stages import Figures, Size, Stage, everything

_DEADLINE_SECONDS = 1200.0
_PARTS_SECONDS = 180.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--instances", type=int, default=1000, help="of two runners")
    parser.add_argument("--kill", type=int, default=100, help="runners that die at once")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds in which nothing may be written")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of who dies")  # noqa: S311
    return parser.parse_args()


async def _run(size: Size, seed: int, folder: Path) -> None:
    def done(stage: Stage, figures: Figures) -> None:
        print(report.text(stage, figures), flush=True)

    async with place(folder, tell) as made:
        figures = await everything(made, size, done, seed)
        print(report.made_of(figures, await _parts(made.kubelet.folder / "kubelet.kubeconfig")))


async def _parts(kubeconfig: Path) -> Parts:
    argv = [sys.executable, "-m", "tests.scale.memory", str(kubeconfig), NAMESPACE]
    process = await asyncio.create_subprocess_exec(
        *argv, env={**os.environ, "PYTHONPATH": python_path()}, stdout=subprocess.PIPE
    )
    async with asyncio.timeout(_PARTS_SECONDS):
        output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}")
    return Parts(**json.loads(output))


def main() -> None:
    """Measure and print."""
    # Whatever ends this process, the servers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = _arguments()
    began, load = time.monotonic(), os.getloadavg()[0]
    size = Size(arguments.instances, arguments.kill, arguments.idle, _DEADLINE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="bench-operator-") as folder:
        logging.basicConfig(filename=Path(folder) / "runners.log", level=logging.WARNING)
        print(
            f"{size.instances} instances on {os.cpu_count()} cores, load {load:.1f} before; seed {arguments.seed}",
            flush=True,
        )
        asyncio.run(_run(size, arguments.seed, Path(folder)))
    print(f"took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
