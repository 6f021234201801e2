"""Command line and environment of the operator."""

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_operator.act.tokens import DEFAULT_KEY_SECRET
from mlx_operator.observe.sweep import PERIOD_SECONDS

_PREFIX = "MLX_OPERATOR_"
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class OptionError(Exception):
    """An option with a value that cannot be; the text names it, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that can be set from outside."""

    runner_image: str
    runner_image_pull_policy: str | None
    namespace: str
    watch_namespaces: tuple[str, ...]
    leader_elect: bool
    lease_name: str
    key_secret: str
    kubeconfig: str | None
    metrics_bind: Address | None
    probes_bind: Address | None
    log_level: str
    log_format: str
    workers: int
    sweep_seconds: tuple[float, float]
    identity: str
    """Differs for every process."""
    pod: str | None
    """Our pod's name, where the environment tells it (POD_NAME)."""


def parse(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Options:
    """Read the options; each flag has an environment variable `MLX_OPERATOR_FLAG_NAME`, which the flag overrides.

    Raises:
        OptionError: a value cannot be used.
        SystemExit: argparse refused the command line.
    """
    environment = os.environ if environment is None else environment
    found = _parser(environment).parse_args(arguments)
    if not found.runner_image:
        raise OptionError(f"--runner-image is empty: name the image of the runners (or set {_PREFIX}RUNNER_IMAGE)")
    pod = environment.get("POD_NAME") or None
    low, high = found.sweep_min_seconds, found.sweep_max_seconds
    if not 0 < low <= high:
        raise OptionError(f"--sweep-min-seconds {low} and --sweep-max-seconds {high}: 0 < minimum <= maximum is needed")
    watched = found.watch_namespace or environment.get(f"{_PREFIX}WATCH_NAMESPACE", "").split(",")
    return Options(
        runner_image=found.runner_image,
        runner_image_pull_policy=found.runner_image_pull_policy or None,
        namespace=found.namespace or _own_namespace(),
        watch_namespaces=tuple(dict.fromkeys(name.strip() for name in watched if name.strip())),
        leader_elect=found.leader_elect,
        lease_name=found.lease_name,
        key_secret=found.key_secret,
        kubeconfig=found.kubeconfig or None,
        metrics_bind=_address("--metrics-bind", found.metrics_bind),
        probes_bind=_address("--probes-bind", found.probes_bind),
        log_level=found.log_level,
        log_format=found.log_format,
        workers=found.workers,
        sweep_seconds=(low, high),
        identity=f"{pod or socket.gethostname()}_{os.urandom(4).hex()}",
        pod=pod,
    )


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mlx-operator", description="Runs MLX language models over pods.")

    def add(flag: str, default: str, text: str, **more: object) -> None:
        variable = _PREFIX + flag.removeprefix("--").replace("-", "_").upper()
        chosen = environment.get(variable, default)
        parser.add_argument(flag, default=chosen, help=f"{text} [{variable}]", **more)  # type: ignore[arg-type]

    add("--runner-image", "", "default image of the runner pods")
    add("--runner-image-pull-policy", "", "imagePullPolicy of the runner pods: Always, IfNotPresent or Never")
    add("--namespace", environment.get("POD_NAMESPACE", ""), "own namespace: of the Lease and of the operator's key")
    parser.add_argument(
        "--watch-namespace",
        action="append",
        metavar="NAMESPACE",
        help=f"watch only this namespace; repeatable. Default: all [{_PREFIX}WATCH_NAMESPACE, comma-separated]",
    )
    parser.add_argument(
        "--leader-elect",
        action=argparse.BooleanOptionalAction,
        default=environment.get(f"{_PREFIX}LEADER_ELECT", "true").lower() != "false",
        help="lead through a Lease; without it nothing keeps two operators from acting at once",
    )
    add("--lease-name", "mlx-operator", "name of the Lease")
    add("--key-secret", DEFAULT_KEY_SECRET, "name of the Secret with the operator's key")
    add("--kubeconfig", environment.get("KUBECONFIG", ""), "kubeconfig file; default: the pod's service account")
    add("--metrics-bind", "0.0.0.0:9090", "HOST:PORT of /metrics, or off")
    add("--probes-bind", "0.0.0.0:8081", "HOST:PORT of /healthz and /readyz, or off")
    add("--log-level", "info", "log level", choices=["debug", "info", "warning", "error"])
    add("--log-format", "logfmt", "log format", choices=["logfmt", "json"])
    add("--workers", "4", "reconciles at the same time", type=int)
    add("--sweep-min-seconds", str(PERIOD_SECONDS[0]), "shortest time between full lists", type=float)
    add("--sweep-max-seconds", str(PERIOD_SECONDS[1]), "longest time between full lists", type=float)
    return parser


def _own_namespace() -> str:
    if _OWN_NAMESPACE.is_file():
        return _OWN_NAMESPACE.read_text().strip()
    raise OptionError(f"--namespace is not set: name the operator's own namespace (or set {_PREFIX}NAMESPACE)")


def _address(flag: str, text: str) -> Address | None:
    if text == "off":
        return None
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise OptionError(f"{flag} {text!r}: write HOST:PORT such as 0.0.0.0:9090, or off")
    return Address(host.strip("[]") or "0.0.0.0", int(port))  # noqa: S104 (a container's probes and metrics)
