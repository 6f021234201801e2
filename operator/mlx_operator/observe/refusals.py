"""The API server's refusals of our children: shown in status, and tried again with a back-off."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from mlx_operator.decide.observed import Refusal
from mlx_operator.observe.shelf import Key

FIRST_SECONDS = 5.0
LONGEST_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class _Record:
    refusal: Refusal
    attempts: int
    manifest: str
    late: bool

    @property
    def again_at(self) -> datetime:
        seconds = min(LONGEST_SECONDS, FIRST_SECONDS * 2 ** min(self.attempts - 1, 8))
        return self.refusal.time + timedelta(seconds=seconds)


class Refusals:
    """By instance and name of the child."""

    def __init__(self) -> None:
        self._records: dict[Key, dict[str, _Record]] = {}

    def of(self, key: Key) -> Mapping[str, Refusal]:
        """The refusals of an instance, by name of the child."""
        return {child: record.refusal for child, record in self._records.get(key, {}).items()}

    def note(self, key: Key, child: str, manifest: Mapping[str, Any], refusal: Refusal, *, late: bool = False) -> None:
        """Keep the answer to an attempt. `late`: it came by a time-out."""
        records = self._records.setdefault(key, {})
        before = records.get(child)
        attempts = before.attempts + 1 if before is not None else 1
        records[child] = _Record(refusal, attempts, _text(manifest), late)

    def clear(self, key: Key, child: str) -> bool:
        """The child exists: forget the refusal. True when there was one."""
        records = self._records.get(key, {})
        found = records.pop(child, None) is not None
        if not records:
            self._records.pop(key, None)
        return found

    def forget(self, key: Key) -> None:
        """The instance is gone."""
        self._records.pop(key, None)

    def wait(self, key: Key, child: str, manifest: Mapping[str, Any], now: datetime) -> float:
        """Seconds until the next attempt is due: none for a manifest that was not refused in this form."""
        record = self._records.get(key, {}).get(child)
        if record is None or record.manifest != _text(manifest):
            return 0.0
        return max(0.0, (record.again_at - now).total_seconds())

    def held_up(self, key: Key, child: str, now: datetime) -> float:
        """Seconds until another child is due whose last attempt ended by a time-out."""
        others = (record for name, record in self._records.get(key, {}).items() if name != child and record.late)
        return max([0.0, *((record.again_at - now).total_seconds() for record in others)])


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, sort_keys=True)
