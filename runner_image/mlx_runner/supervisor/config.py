"""The environment of a runner container, read once into a frozen `Config`."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_operator_api import names

ENV_BLAS = "MLX_RUNNER_BLAS"
"""Library to preload into the engine; MLX's CPU wheel brings only the reference BLAS."""
ENV_ENGINE = "MLX_RUNNER_ENGINE"
"""Command line of another engine than ours, for tests."""
_EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 (clients, probes and port-forward reach a pod by different addresses)


class ConfigError(ValueError):
    """One sentence: the variable, its value, and what to do."""


@dataclass(frozen=True, slots=True)
class Config:
    """Who this runner is and where its things are."""

    uid: str
    """uid of the ModelInstance."""
    rank: int
    token: str
    instance: str = ""
    namespace: str = ""
    pod_name: str = ""
    pod_uid: str = ""
    pod_ip: str = ""
    node_name: str = ""
    listen_host: str = _EVERY_ADDRESS
    state_dir: Path = Path(names.STATE_MOUNT)
    model_dir: Path = Path(names.MODEL_MOUNT)
    adapter_dir: Path = Path(names.ADAPTER_MOUNT)
    cache_dir: Path = Path(names.CACHE_MOUNT)
    cache_bytes: int | None = None
    """Most that may lie in `cache_dir`; None: what its file system has."""
    api_key_file: Path | None = None
    """Keys of clients, one a line; None: everybody is let in."""
    grace_seconds: float = 30.0
    blas: Path | None = None
    engine_argv: tuple[str, ...] = (sys.executable, "-m", "mlx_runner.engine")
    public_port: int = names.PUBLIC_PORT
    control_port: int = names.CONTROL_PORT


def from_environment(environment: Mapping[str, str] = os.environ) -> Config:
    """Read the configuration.

    Raises:
        ConfigError: a variable is missing or invalid.
    """
    token_file = Path(environment.get(names.ENV_TOKEN_FILE) or f"{names.TOKEN_MOUNT}/{names.TOKEN_KEY}")
    blas = environment.get(ENV_BLAS)
    engine = environment.get(ENV_ENGINE)
    api_keys = environment.get(names.ENV_API_KEY_FILE)
    defaults = Config(uid="", rank=0, token="")
    return Config(
        uid=_required(environment, names.ENV_UID),
        rank=_rank(_required(environment, names.ENV_RANK)),
        token=_token(token_file),
        instance=environment.get(names.ENV_INSTANCE, ""),
        namespace=environment.get(names.ENV_NAMESPACE, ""),
        pod_name=environment.get(names.ENV_POD_NAME, ""),
        pod_uid=environment.get(names.ENV_POD_UID, ""),
        pod_ip=environment.get(names.ENV_POD_IP, ""),
        node_name=environment.get(names.ENV_NODE_NAME, ""),
        listen_host=environment.get(names.ENV_LISTEN_HOST) or defaults.listen_host,
        state_dir=_directory(environment, names.ENV_STATE_DIR, defaults.state_dir),
        model_dir=Path(environment.get(names.ENV_MODEL_DIR) or defaults.model_dir),
        adapter_dir=Path(environment.get(names.ENV_ADAPTER_DIR) or defaults.adapter_dir),
        cache_dir=Path(environment.get(names.ENV_CACHE_DIR) or defaults.cache_dir),
        cache_bytes=_bytes(environment, names.ENV_CACHE_BYTES),
        api_key_file=Path(api_keys) if api_keys else None,
        grace_seconds=_seconds(environment, names.ENV_GRACE, defaults.grace_seconds),
        blas=Path(blas) if blas else None,
        engine_argv=tuple(shlex.split(engine)) if engine else defaults.engine_argv,
    )


def _required(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "").strip()
    if not value:
        raise ConfigError(f"the environment variable {name} is not set: the operator sets it in every runner pod")
    return value


def _rank(text: str) -> int:
    if not text.isdecimal() or int(text) >= names.MAX_RUNNERS:
        raise ConfigError(
            f"{names.ENV_RANK}={text!r} is no rank: it must be a number from 0 to {names.MAX_RUNNERS - 1}"
        )
    return int(text)


def _seconds(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={text!r} is no duration: it must be a number of seconds, such as 30")
    return value


def _bytes(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is no size: it must be a number of bytes, such as 21474836480")
    return int(text)


def _directory(environment: Mapping[str, str], name: str, default: Path) -> Path:
    path = Path(environment.get(name) or default)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ConfigError(f"{name}={str(path)!r} is no writable directory: mount an emptyDir there")
    return path


def _token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the token file {path} ({error}): "
            f"mount the instance's Secret there or set {names.ENV_TOKEN_FILE}"
        ) from error
    if not token:
        raise ConfigError(f"the token file {path} is empty: the key {names.TOKEN_KEY!r} of the instance's Secret is")
    return token
