"""An engine that fails ends, also when it cannot say why."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_runner.channel import FAILURE_EXIT_CODE

SCRIPT = """
import socket, sys, threading
from pathlib import Path
from mlx_runner.engine.main import Engine
from mlx_runner.progress import Progress

class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no words")

here, there = socket.socketpair()
engine = Engine(here, Progress(Path(sys.argv[1]), create=True))
if sys.argv[2] == "thread":
    threading.excepthook = lambda hook: engine.crash(hook.exc_value)
    def fail(): raise Unspeakable
    threading.Thread(target=fail).start()
    threading.Event().wait(30)
else:
    engine.crash(Unspeakable())
sys.exit(3)
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_an_engine_whose_failure_cannot_be_described_ends_all_the_same(tmp_path: Path, where: str) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "page", where],
        env={"PYTHONPATH": f"{root / 'api'}:{root / 'runner_image'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == FAILURE_EXIT_CODE, done.stderr
