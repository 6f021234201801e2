"""`spec.restartPolicy`: what happens after a failure, with the defaults."""

from typing import Annotated

from pydantic import ConfigDict, Field

from .base import Lenient
from .cel import cel
from .fields import (
    DURATION_RULE,
    Duration,
)

DEFAULT_BACKOFF_INITIAL = "2s"
DEFAULT_BACKOFF_MAX = "5m"


class Backoff(Lenient):
    """Time before a restart. The first restart of a window is at once."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            rule=f"!has(self.initial) || !self.initial.matches('{DURATION_RULE}') "
            f"|| (has(self.max) && !self.max.matches('{DURATION_RULE}')) "
            f"|| duration(self.initial) <= duration(has(self.max) ? self.max : '{DEFAULT_BACKOFF_MAX}')",
            message=f"initial is longer than max (default {DEFAULT_BACKOFF_MAX}): lower initial or raise max",
            expression="'initial ' + self.initial + ' is longer than max ' "
            f"+ (has(self.max) ? self.max : '{DEFAULT_BACKOFF_MAX} (the default)') + ': lower initial or raise max'",
        )
    )

    initial: Duration | None = None
    """Of the second restart. Default: 2s. Doubles with each further one."""
    max: Duration | None = None
    """Upper bound. Default: 5m."""


class RestartPolicy(Lenient):
    """What happens after a failure."""

    max_restarts: Annotated[int | None, Field(ge=0, le=1000)] = None
    """Failures in a window before the group is Stalled; raised then, the group starts again. Default: 5."""
    backoff: Backoff | None = None
    """Time before a restart."""
    reset_after: Duration | None = None
    """Ready for this long: the budget is full again. Default: 10m."""


DEFAULT_MAX_RESTARTS = 5
DEFAULT_RESET_AFTER = "10m"
