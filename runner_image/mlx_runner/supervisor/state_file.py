"""The last report on an emptyDir, for the supervisor that follows in the same pod.

On cgroup v2 the kernel's OOM killer takes the whole container, this process included. What the predecessor last wrote
is then the only witness of what it was doing.
"""

import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import Predecessor, RunnerReport

log = logging.getLogger(__name__)

_NAME = "report.json"


class StateFile:
    """Writes every report, whole or not at all. No fsync: it must survive our process, not the machine."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / _NAME
        self._failed = False

    def write(self, report: RunnerReport) -> None:
        """Write a report. A full or broken volume is logged once and never stops the runner."""
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_text(report.model_dump_json(by_alias=True, exclude_none=True))
            os.replace(fresh, self._path)
        except OSError as error:
            if not self._failed:
                log.warning("cannot write %s: %s; a successor will not know of this runner", self._path, error)
            self._failed = True
        else:
            self._failed = False

    def predecessor(self, instance_uid: str, rank: int) -> Predecessor | None:
        """What the predecessor last reported, if it had a runner that was not shut down."""
        try:
            text = self._path.read_bytes()
            written = datetime.fromtimestamp(self._path.stat().st_mtime, UTC)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cannot read %s: %s", self._path, error)
            return None
        try:
            last = RunnerReport.model_validate_json(text)
        except ValidationError as error:
            log.warning("the predecessor's report %s cannot be decoded: %s", self._path, str(error).replace("\n", " "))
            return None
        if (last.instance_uid, last.rank) != (instance_uid, rank):
            return None
        if last.epoch < 1:
            # It had nothing to lose itself; what it knew of its own predecessor must not get lost with it.
            return last.predecessor
        if last.state is RunnerState.SHUTDOWN:
            return None
        return Predecessor(
            incarnation=last.incarnation,
            epoch=last.epoch,
            state=last.state,
            last_report=written,
            failure=last.failure,
        )
