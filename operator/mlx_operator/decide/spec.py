"""The desired state, parsed once: defaults applied, the source split, the annotations read."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ValidationError

from mlx_operator_api import names, source
from mlx_operator_api.base import parse_time, seconds
from mlx_operator_api.deadlines import Deadlines
from mlx_operator_api.modelinstance import Spec
from mlx_operator_api.restart_policy import (
    DEFAULT_BACKOFF_INITIAL,
    DEFAULT_BACKOFF_MAX,
    DEFAULT_MAX_RESTARTS,
    DEFAULT_RESET_AFTER,
)
from mlx_operator_api.sizes import quantity
from mlx_operator_api.source import Source, SourceKind
from mlx_operator_api.status import Status
from mlx_operator_api.tasks import CreateRunner, Sharding

from .observed import Manifest


class InvalidSpecError(ValueError):
    """The stored spec cannot be used: the message names the field, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class RestartRules:
    """`spec.restartPolicy` with its defaults, in seconds."""

    max_restarts: int
    initial: float
    max: float
    reset_after: timedelta


@dataclass(frozen=True)
class Wanted:
    """What the user wants of this ModelInstance."""

    name: str
    namespace: str
    uid: str
    generation: int
    spec: Spec
    source: Source
    adapter: Source | None
    runner: CreateRunner
    """What every runner is told; its hash says whether a new epoch is due."""
    deadlines: Deadlines
    restarts: RestartRules
    retry: str | None
    restart: str | None
    template_hashes: dict[tuple[str, str], str] = field(default_factory=dict, init=False, compare=False, repr=False)
    """What `template.template_hash` worked out, by image and key: a plan asks for it several times."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.spec.world_size

    @property
    def from_hub(self) -> bool:
        """Whether something is fetched from a hub: the model or its adapter."""
        return any(s is not None and s.kind is SourceKind.HUB for s in (self.source, self.adapter))

    @property
    def suspended(self) -> bool:
        """`spec.suspend`."""
        return bool(self.spec.suspend)

    @property
    def endpoint(self) -> str:
        """Where clients go."""
        return names.endpoint(self.name, self.namespace)

    @cached_property
    def spec_hash(self) -> str:
        """Hash of what an epoch is started with: another one means that a new epoch is due.

        Only what the user set: a field or a default that a later release brings restarts no model.
        """
        runner, spec = self.runner, self.spec
        inputs: dict[str, Any] = {
            "worldSize": runner.world_size,
            "sharding": runner.sharding,
            "source": runner.source,
            "adapter": {} if runner.adapter is None else runner.adapter,
            "servedName": runner.served_name,
            "serving": _set_by_user(spec.serving, runner.serving),
            "deadlines": _set_by_user(spec.deadlines, runner.deadlines),
        }
        return digest({name: value for name, value in inputs.items() if value != {}})

    def deadline(self, name: str) -> timedelta:
        """One of `spec.deadlines`."""
        return timedelta(seconds=self.deadlines.of(name))


def parse(instance: Manifest) -> Wanted:
    """Parse a ModelInstance.

    Raises:
        InvalidSpecError: the CRD's validation did not see it (an older CRD, ratcheting), and it cannot be used.
    """
    metadata = instance["metadata"]
    annotations = metadata.get("annotations") or {}
    try:
        spec = Spec.model_validate(instance.get("spec") or {})
        deadlines = spec.deadlines or Deadlines()
        _check_cache(spec)
        return Wanted(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            spec=spec,
            source=source.parse(spec.model.source),
            adapter=_adapter(spec),
            runner=_runner(spec, metadata["name"], deadlines),
            deadlines=_checked(deadlines),
            restarts=_restarts(spec),
            retry=annotations.get(names.RETRY_ANNOTATION),
            restart=annotations.get(names.RESTART_ANNOTATION),
        )
    except ValidationError as error:
        raise InvalidSpecError(_first(error)) from error
    except ValueError as error:
        text = str(error)
        raise InvalidSpecError(text if text.startswith("spec.") else f"spec.model.source: {text}") from error


def remembered(instance: Manifest, status: Status) -> Wanted | None:
    """The group that status knows of, for a spec that cannot be used: what runs is looked after all the same.

    Of the spec it takes what can be read by itself: `suspend`, `deadlines` and `restartPolicy`. None: nothing runs yet.
    """
    if status.model is None or status.model.source is None or not status.runners:
        return None
    raw = instance.get("spec") or {}
    source, adapter = status.model.sources
    model = {"source": source, "adapter": {"source": adapter} if adapter is not None else None}
    spec: dict[str, Any] = {"model": model, "runners": len(status.runners)}
    found = parse({**instance, "spec": spec})
    for name in ("suspend", "deadlines", "restartPolicy"):
        if name in raw:
            with contextlib.suppress(InvalidSpecError):
                found = parse({**instance, "spec": {**spec, name: raw[name]}})
                spec[name] = raw[name]
    return found


def digest(data: Any) -> str:
    """A short hash of JSON data, the same in every process."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def time_of(value: Any) -> datetime | None:
    """A time of the API server."""
    parsed = parse_time(value)
    return parsed if isinstance(parsed, datetime) else None


def _adapter(spec: Spec) -> Source | None:
    if spec.model.adapter is None:
        return None
    try:
        return source.parse(spec.model.adapter.source)
    except ValueError as error:
        raise ValueError(f"spec.model.adapter.source: {error}") from error


def _set_by_user(given: BaseModel | None, told: BaseModel) -> dict[str, Any]:
    """Of what the runner is told, the fields that the spec sets: in the runner's units, so that `60s` is `1m`."""
    return {name: getattr(told, name) for name in type(told).model_fields if getattr(given, name, None) is not None}


def _runner(spec: Spec, name: str, deadlines: Deadlines) -> CreateRunner:
    serving = spec.serving
    sharding = spec.sharding or Sharding.PIPELINE
    task = CreateRunner(
        world_size=spec.world_size,
        sharding=sharding if spec.world_size > 1 else Sharding.PIPELINE,
        source=spec.model.source,
        adapter=spec.model.adapter.source if spec.model.adapter is not None else None,
        served_name=spec.model.served_name or name,
        deadlines=deadlines.for_runner(),
    )
    return task if serving is None else task.model_copy(update={"serving": serving.options()})


def _checked(deadlines: Deadlines) -> Deadlines:
    for name in Deadlines.model_fields:
        deadlines.of(name)
    return deadlines


def _check_cache(spec: Spec) -> None:
    limit = spec.cache.size_limit if spec.cache is not None else None
    try:
        quantity(0 if limit is None else limit)
    except ValueError as error:
        raise ValueError(f"spec.cache.sizeLimit: {error}") from error


def _restarts(spec: Spec) -> RestartRules:
    policy = spec.restart_policy
    backoff = policy.backoff if policy else None
    maximum = policy.max_restarts if policy else None
    return RestartRules(
        max_restarts=DEFAULT_MAX_RESTARTS if maximum is None else maximum,
        initial=_duration("backoff.initial", backoff.initial if backoff else None, DEFAULT_BACKOFF_INITIAL),
        max=_duration("backoff.max", backoff.max if backoff else None, DEFAULT_BACKOFF_MAX),
        reset_after=timedelta(
            seconds=_duration("resetAfter", policy.reset_after if policy else None, DEFAULT_RESET_AFTER)
        ),
    )


def _duration(field: str, text: str | None, default: str) -> float:
    try:
        return seconds(text or default)
    except ValueError as error:
        raise ValueError(f"spec.restartPolicy.{field}: {error}") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    value = first.get("input")
    shown = "" if isinstance(value, Mapping) else f" (found {json.dumps(value, default=str)[:100]})"
    return f"{where}: {first['msg']}{shown}"
