"""The programs of both images are PID 1 of their containers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 60.0


def handles(pid: int, number: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


@pytest.mark.parametrize("program", ["mlx_operator", "mlx_runner"])
def test_sigterm_during_the_imports_ends_it_at_once(tmp_path: Path, program: str) -> None:
    """PID 1 would not even hear it without a handler."""
    (tmp_path / "pydantic.py").write_text("import threading\nthreading.Event().wait()\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:api:operator:runner_image"}
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-m", program], env=environment, cwd=root) as process:
        try:
            deadline = time.monotonic() + SECONDS
            while not handles(process.pid, signal.SIGTERM):
                assert time.monotonic() < deadline, "it never handles SIGTERM"
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
