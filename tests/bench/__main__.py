"""`make bench-serving`: a group of ours and mlx_lm.server on the same weights and threads, taking turns in one run.

python -m tests.bench [--quick] [--shapes single pipeline tensor] [--concurrency 1 4 8 16] [--rounds 3] …
"""

import argparse
import asyncio
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from mlx_operator_api.tasks import ServingOptions, Sharding

from . import table
from .measure import Figures, Plan, everything
from .model import Prompts
from .servers import MODEL_NAME, Shape, ours, upstream


def _shapes(names: list[str]) -> list[Shape]:
    """Every core once: a single rank has as many threads as two ranks have together."""
    known = {
        "single": Shape(1, Sharding.PIPELINE, 2),
        "pipeline": Shape(2, Sharding.PIPELINE, 1),
        "tensor": Shape(2, Sharding.TENSOR, 1),
    }
    return [known[name] for name in names]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n", 1)[0])
    shapes = ["single", "pipeline", "tensor"]
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, help="one rank, or two of a kind")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 8, 16], help="requests at once")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement; the servers take turns")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--long", type=int, default=1024, help="tokens of the prompt beside a late short request")
    parser.add_argument("--quick", action="store_true", help="one round: shows that it works, its figures say little")
    return parser.parse_args()


def _plan(arguments: argparse.Namespace) -> Plan:
    rounds = 1 if arguments.quick else arguments.rounds
    return Plan(tuple(arguments.concurrency), rounds, arguments.prompt, arguments.answer, arguments.long)


async def _shape(shape: Shape, models: Path, home: Path, plan: Plan, prompts: Prompts) -> list[Figures]:
    print(f"{shape}: starting both servers …", flush=True)
    serving = ServingOptions(max_concurrent_requests=max(*plan.concurrencies, plan.late_beside + 2))
    async with ours(home, models, shape, serving) as one, upstream(home, models, shape) as other:
        other.pause()
        return await everything([one, other], prompts, plan)


def _machine() -> str:
    cores, load = os.cpu_count(), os.getloadavg()[0]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    return f"{cores} cores, load {load:.1f} before; {libraries}, Python {platform.python_version()}"


def main() -> None:
    """Measure, then print one table for each shape."""
    # Whatever ends this process, the servers end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = _arguments()
    plan, started, machine = _plan(arguments), time.monotonic(), _machine()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as directory:
        models = Path(directory) / "models"
        print("making a random qwen2 of 94 million parameters …", flush=True)
        # In a process of its own: this one is a client and needs no MLX.
        script = f"from pathlib import Path; from tests.bench.model import build; build(Path({str(models)!r}) / 'tiny')"
        subprocess.run([sys.executable, "-c", script], check=True)
        prompts = Prompts(models / MODEL_NAME)
        results = []
        for shape in _shapes(arguments.shapes):
            home = Path(directory) / shape.sharding.value / str(shape.ranks)
            home.mkdir(parents=True)
            results.append((shape, asyncio.run(_shape(shape, models, home, plan, prompts))))
    print(table.render(results, plan, machine))
    print(f"\ntook {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
