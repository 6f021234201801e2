"""`make test`: every layer, two at a time, with what each of them says, and a table of what they took.

Most of the longest layers' time is waiting for deadlines, so two of them share two cores well. What has to be compiled
first is compiled beside the layers that do not need it, with the lowest priority.

    python -m tests.layers [--jobs N] [LAYER …]     # LAYER: lint, unit, runner, …; all by default
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ALIVE_SECONDS = 30.0
"""Without a line from any layer for this long, we say what is running."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A target of the Makefile, and the one that must have passed before it."""

    name: str
    target: str
    after: str = ""
    background: bool = False
    """Compilers: whatever else runs goes first."""


LAYERS = (
    Layer("lint", "lint"),
    Layer("images", "images", background=True),
    Layer("runner", "test-runner"),
    Layer("unit", "test-unit"),
    Layer("node", "test-node", after="images"),
    Layer("apiserver", "test-apiserver", after="images"),
    Layer("chaos", "test-chaos", after="images"),
    Layer("mutation", "test-mutation", after="images"),
    Layer("model", "test-model"),
    Layer("scale", "test-scale", after="images"),
)
"""In the order in which they start."""


@dataclass(slots=True)
class Run:
    """One layer under way, or done."""

    layer: Layer
    began: float
    code: int | None = None
    took: float = 0.0
    lines: list[str] = field(default_factory=list)


class Layers:
    """Runs them. One that fails does not stop the others, but those that need it are left out."""

    def __init__(self, wanted: Sequence[Layer], jobs: int) -> None:
        self._waiting = list(wanted)
        self._jobs = jobs
        self._running: dict[asyncio.Task[None], Run] = {}
        self._done: dict[str, Run] = {}
        self._left_out: list[Layer] = []
        self._said = time.monotonic()

    async def all(self) -> bool:
        """Run every layer; whether all passed."""
        alive = asyncio.create_task(self._alive(), name="alive")
        try:
            while self._waiting or self._running:
                self._start()
                if self._running:
                    await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task in self._running if task.done()]:
                    run = self._running.pop(task)
                    task.result()
                    self._done[run.layer.name] = run
        finally:
            alive.cancel()
            for task in self._running:
                task.cancel()
            await asyncio.gather(alive, *self._running, return_exceptions=True)
        self._report()
        return not self._left_out and all(run.code == 0 for run in self._done.values())

    def _start(self) -> None:
        for layer in list(self._waiting):
            before = self._done.get(layer.after)
            if before is not None and before.code != 0:
                self._waiting.remove(layer)
                self._left_out.append(layer)
            elif len(self._running) < self._jobs and (not self._pending(layer.after) or before is not None):
                self._waiting.remove(layer)
                run = Run(layer, time.monotonic())
                self._running[asyncio.create_task(self._run(run), name=layer.name)] = run

    def _pending(self, name: str) -> bool:
        """Whether a layer of that name is still to come."""
        running = [run.layer for run in self._running.values()]
        return any(layer.name == name for layer in (*self._waiting, *running))

    async def _run(self, run: Run) -> None:
        nice = ["nice", "-n", "19"] if run.layer.background else []
        argv = [*nice, "make", "--no-print-directory", run.layer.target]
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True
        )
        try:
            assert process.stdout is not None
            async for line in lines_of(process.stdout):
                self._say(run, line)
            run.code = await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                await process.wait()
        run.took = time.monotonic() - run.began
        print(f"[{run.layer.name}] {'passed' if run.code == 0 else 'FAILED'} after {_clock(run.took)}", flush=True)

    def _say(self, run: Run, line: str) -> None:
        run.lines.append(line)
        self._said = time.monotonic()
        print(f"[{run.layer.name}] {line}", flush=True)

    async def _alive(self) -> None:
        while True:
            await asyncio.sleep(_ALIVE_SECONDS / 3)
            if time.monotonic() - self._said > _ALIVE_SECONDS:
                self._said = time.monotonic()
                under_way = [f"{r.layer.name} {_clock(self._said - r.began)}" for r in self._running.values()]
                print(f"still running: {', '.join(under_way)}", flush=True)

    def _report(self) -> None:
        for run in self._done.values():
            if run.code != 0:
                print(f"\n{run.layer.name}, the end of its output:\n" + "\n".join(run.lines[-60:]))
        print(f"\n{'layer':<12} {'result':<8} {'time':>6}")
        for run in self._done.values():
            print(f"{run.layer.name:<12} {'passed' if run.code == 0 else 'FAILED':<8} {_clock(run.took):>6}")
        for layer in self._left_out:
            print(f"{layer.name:<12} {'not run':<8}        because {layer.after} failed")


async def lines_of(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of a program's output, however long: a StreamReader's own end in an error at a limit."""
    begun: list[bytes] = []
    while chunk := await stream.read(1 << 16):
        end, *more = chunk.split(b"\n")
        begun.append(end)
        for begin in more:
            yield b"".join(begun).decode(errors="replace")
            begun = [begin]
    if rest := b"".join(begun):
        yield rest.decode(errors="replace")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


async def _main(wanted: Sequence[Layer], jobs: int) -> bool:
    mine = asyncio.current_task()
    assert mine is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, mine.cancel)
    return await Layers(wanted, jobs).all()


def main() -> int:
    """Run the layers; 0 when all passed."""
    names = [layer.name for layer in LAYERS]
    parser = argparse.ArgumentParser(prog="python -m tests.layers")
    parser.add_argument("layers", nargs="*", metavar="LAYER", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at a time")
    arguments = parser.parse_args()
    if unknown := set(arguments.layers) - set(names):
        parser.error(f"no such layer: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    wanted = [layer for layer in LAYERS if not arguments.layers or layer.name in arguments.layers]
    began = time.monotonic()
    try:
        passed = asyncio.run(_main(wanted, arguments.jobs))
    except asyncio.CancelledError:
        return 130
    print(f"\nmake test: {'all layers passed' if passed else 'FAILED'} in {_clock(time.monotonic() - began)}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
