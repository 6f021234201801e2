"""`spec.deadlines`: how long each step may take, with the defaults."""

from .base import Lenient, seconds
from .fields import (
    Duration,
)
from .tasks import DeadlineSeconds


class Deadlines(Lenient):
    """How long each step may take."""

    schedule: Duration | None = None
    """A pod is placed. Default: 10m."""
    pull: Duration | None = None
    """A placed pod's container runs. Default: 10m."""
    unreachable: Duration | None = None
    """A supervisor that was reached says something again. It has a word every 2 s, and its connection is given up after
    4.5 s without one: less than that counts as that. Default: 8s."""
    download: Duration | None = None
    """The files are present and verified. Default: 1h."""
    connect: Duration | None = None
    """The group is formed. Default: 40s."""
    load: Duration | None = None
    """The shard is loaded. Default: 10m."""
    warmup: Duration | None = None
    """The warm-up is done. Default: 5m."""
    progress: Duration | None = None
    """One step of the engine, while it has work. Default: 2m."""
    shutdown: Duration | None = None
    """Running requests finish. Default: 30s."""
    resume: Duration | None = None
    """Requests of clients are held while the group restarts; then they get an error. Default: 1m."""

    def of(self, name: str) -> float:
        """Seconds of one deadline, with its default.

        Raises:
            ValueError: the stored text is no duration (only past the CRD's validation).
        """
        text = getattr(self, name) or DEFAULT_DEADLINES[name]
        try:
            return seconds(text)
        except ValueError as error:
            raise ValueError(f"spec.deadlines.{name}: {error}") from error

    def for_runner(self) -> DeadlineSeconds:
        """Those that the supervisor keeps."""
        return DeadlineSeconds(**{name: self.of(name) for name in DeadlineSeconds.model_fields})


DEFAULT_DEADLINES = {
    "schedule": "10m",
    "pull": "10m",
    "unreachable": "8s",
    "download": "1h",
    "connect": "40s",
    "load": "10m",
    "warmup": "5m",
    "progress": "2m",
    "shutdown": "30s",
    "resume": "1m",
}
OPERATOR_GRACE_SECONDS = 10.0
"""The operator waits this much longer than the supervisor's own deadline before it acts itself."""
