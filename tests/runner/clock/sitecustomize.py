"""Put on PYTHONPATH: the supervisor's one reading of the wall clock is off by the seconds in the file `WALL_CLOCK`.

No clock of this machine is touched. Everything that waits reads CLOCK_MONOTONIC, which cannot jump.
"""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from mlx_runner.supervisor import machine


class _Jumping(datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return datetime.now(UTC) + timedelta(seconds=float(Path(os.environ["WALL_CLOCK"]).read_text()))


vars(machine)["datetime"] = _Jumping
