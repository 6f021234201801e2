"""Structured logs: one line per decision, as logfmt or JSON, and the host's noise kept down."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_FIELDS = "mlx_fields"
_NOISE_SECONDS = 30.0
log = logging.getLogger("mlx_operator")


def decision(
    what: str, *, level: int = logging.INFO, error: BaseException | None = None, traceback: bool = False, **fields: Any
) -> None:
    """Log one decision with its fields (`instance`, `epoch`, `rank`, `reason`, ...); None values are left out."""
    if error is not None:
        fields["error"] = f"{type(error).__name__}: {error}"
    # As text, but numbers and booleans: JSON would make a list of a named tuple.
    shown = {
        key: value if isinstance(value, int | float) else str(value)
        for key, value in fields.items()
        if value is not None
    }
    log.log(level, what, extra={_FIELDS: shown}, exc_info=error if traceback else None)


class _Structured(logging.Formatter):
    def _entry(self, record: logging.LogRecord) -> dict[str, Any]:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "msg": record.getMessage()}
        if record.name != log.name:
            entry["logger"] = record.name
        fields: Mapping[str, Any] = getattr(record, _FIELDS, {})
        entry |= fields
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return entry


class JsonFormatter(_Structured):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return json.dumps(self._entry(record), default=str, ensure_ascii=False)


class LogfmtFormatter(_Structured):
    """key=value pairs; a value with spaces, quotes or line breaks is quoted as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return " ".join(f"{key}={_plain(value)}" for key, value in self._entry(record).items())


def _plain(value: Any) -> str:
    text = str(value)
    simple = text and not any(char in text for char in ' "=\n\t')
    return text if simple else json.dumps(text, ensure_ascii=False)


class RateLimit(logging.Filter):
    """Lets one record per logger, level and template pass every `seconds`: retries of the host would flood the log."""

    def __init__(self, seconds: float = _NOISE_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._last: dict[tuple[str, int, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        # kopf formats before it logs: the head of the text stands for the template.
        where = (record.name, record.levelno, str(record.msg)[:40])
        now = time.monotonic()
        if now - self._last.get(where, -self._seconds) < self._seconds:
            return False
        self._last[where] = now
        return True


def configure(level: str, style: str) -> None:
    """Set up the root logger: `level` as in logging, `style` json or logfmt."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else LogfmtFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # kopf logs every call of every event handler on INFO.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)
    noise = RateLimit()
    handler.addFilter(lambda record: not record.name.startswith("kopf.") or noise.filter(record))
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
