"""Builds every program of the local cluster with `go build`, from the Go modules beside this file.

Nothing is downloaded as a binary. Each upstream project has a go.mod of its own (their dependencies would fight in a
shared one) and a cache folder whose name is a key of everything that decides the result, so that a change of one
project rebuilds only that one. `python -m tests.cluster.binaries` builds all and prints the folder: about 13 minutes
on two cores from nothing, a minute from a warm Go build cache, nothing when cached.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Set

from tests.cluster.buildcache import BuildError, Progress, check_disk, key_of, key_of_files, locked, persistently, run
from tests.cluster.paths import cache_root

MODULES = pathlib.Path(__file__).resolve().parent / "go"
BUILD_FLAGS = ("-trimpath", "-buildvcs=false")
LINK_FLAGS = "-s -w"
BUILD_DEADLINE_SECONDS = 3600.0
QUERY_DEADLINE_SECONDS = 120.0
# A build of everything from nothing leaves 6.4 GB of build cache, 3.0 GB of modules and 0.8 GB of programs.
DISK_NEEDED_BYTES = 11 << 30
# In what Go says when a module could not be fetched this time; a program that does not compile will not do so later.
_NETWORK_TROUBLE = re.compile(
    r"timeout|timed out|connection (?:reset|refused)|TLS|\b50[0-4] [A-Z]|(?<!syntax error: unexpected )\bEOF\b"
)
_GO_REMEDY = "install Go from your distribution or from the Go project, put `go` on PATH, and run this again"


@dataclasses.dataclass(frozen=True)
class Project:
    """One upstream project: the folder of its go.mod under go/, and the Go package of each program taken from it."""

    name: str
    programs: Mapping[str, str]
    version_of: str = ""  # the module whose version the programs report; only Kubernetes needs to be told

    @property
    def folder(self) -> pathlib.Path:
        """Where its go.mod lies."""
        return MODULES / self.name


_KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
_PLUGINS = ("main/bridge", "main/loopback", "ipam/host-local", "meta/portmap")
PROJECTS = (
    Project("pause", {"pause": "."}),
    Project("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}),
    Project("kubernetes", {name: f"k8s.io/kubernetes/cmd/{name}" for name in _KUBERNETES}, "k8s.io/kubernetes"),
    Project(
        "containerd",
        {
            name: f"github.com/containerd/containerd/v2/cmd/{name}"
            for name in ("containerd", "containerd-shim-runc-v2", "ctr")
        },
    ),
    Project(
        "cni",
        {
            f"cni/{plugin.rpartition('/')[2]}": f"github.com/containernetworking/plugins/plugins/{plugin}"
            for plugin in _PLUGINS
        },
    ),
    Project("coredns", {"coredns": "github.com/coredns/coredns"}),
    Project("helm", {"helm": "helm.sh/helm/v4/cmd/helm"}),
)
PROGRAMS = frozenset(program for project in PROJECTS for program in project.programs)


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """What `go env` says where a project is built."""

    version: str
    system: str
    architecture: str
    build_cache: pathlib.Path


def ensure(progress: Progress, only: Set[str] = PROGRAMS) -> pathlib.Path:
    """Returns a folder that holds the programs, building those that the cache lacks.

    Args:
        progress: told one line per program that is built.
        only: the programs needed, as named in `PROGRAMS`; others may be missing from the folder.

    Raises:
        BuildError: Go is missing or too old, the disk is nearly full, or a build failed.
    """
    if unknown := only - PROGRAMS:
        raise BuildError(
            f"no such program: {', '.join(sorted(unknown))}; the cluster has {', '.join(sorted(PROGRAMS))}"
        )
    store = cache_root() / "bin"
    wanted = [project for project in PROJECTS if only & project.programs.keys()]
    for project in wanted:
        _ensure_project(project, only & project.programs.keys(), store, progress)
    together = store / f"all-{key_of(project_key(project) for project in PROJECTS)}"
    for project in wanted:
        for program in sorted(only & project.programs.keys()):
            _link(_home(project, store) / program, together / program)
    return together


def program_key(program: str) -> str:
    """The key of the inputs that one program is built from, without building it."""
    return project_key(next(project for project in PROJECTS if program in project.programs))


def project_key(project: Project) -> str:
    """The key of a project: its module files and sources, its packages, the flags, the Go version and the platform."""
    go = toolchain(project.folder)
    files = [file for file in project.folder.iterdir() if file.suffix in {".mod", ".sum", ".go"}]
    return key_of(
        [
            json.dumps(dict(project.programs), sort_keys=True),
            " ".join(BUILD_FLAGS),
            link_flags(project),
            f"{go.version} {go.system}/{go.architecture}",
            key_of_files(project.folder, files),
        ]
    )


def link_flags(project: Project) -> str:
    """The linker's flags; Kubernetes gets its version stamped in, or kubectl and Helm see a v0.0.0 server."""
    if not project.version_of:
        return LINK_FLAGS
    version = required_version(project.folder / "go.mod", project.version_of)
    minor = version.split(".")[1]
    stamps = [
        f"-X {package}.{name}={value}"
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
        for name, value in (("gitVersion", version), ("gitMajor", "1"), ("gitMinor", minor))
    ]
    return " ".join([LINK_FLAGS, *stamps])


def required_version(go_mod: pathlib.Path, module: str) -> str:
    """The version of a module that a go.mod requires.

    Raises:
        BuildError: the file does not require it.
    """
    found = re.search(rf"^\s*(?:require\s+)?{re.escape(module)}\s+(v\S+)", go_mod.read_text(), re.MULTILINE)
    if not found:
        raise BuildError(f"{go_mod} requires no version of {module}: restore the file from version control")
    return found.group(1)


@functools.cache
def toolchain(folder: pathlib.Path) -> Toolchain:
    """The Go that builds the module in a folder.

    Raises:
        BuildError: there is no Go, or it is older than the module asks for and may not fetch a newer one.
    """
    names = ["GOVERSION", "GOOS", "GOARCH", "GOCACHE"]
    try:
        answer = subprocess.run(
            ["go", "env", "-json", *names],
            cwd=folder,
            env=_go_environment(),
            capture_output=True,
            text=True,
            timeout=QUERY_DEADLINE_SECONDS,
            check=False,
        )
    except FileNotFoundError as error:
        raise BuildError(f"Go is not installed, and the cluster's programs are built with it: {_GO_REMEDY}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"`go env` gave no answer in {QUERY_DEADLINE_SECONDS:.0f} s: {_GO_REMEDY}") from error
    if answer.returncode != 0:
        said = answer.stderr.strip().replace("\n", " ")
        raise BuildError(f"`go env` failed in {folder} ({said}): {_GO_REMEDY}")
    values = json.loads(answer.stdout)
    needed = required_go(folder / "go.mod")
    if _numbers(values["GOVERSION"]) < _numbers(needed):
        raise BuildError(f"{values['GOVERSION']} is too old: {folder.name} needs Go {needed} or newer; {_GO_REMEDY}")
    return Toolchain(values["GOVERSION"], values["GOOS"], values["GOARCH"], pathlib.Path(values["GOCACHE"]))


def required_go(go_mod: pathlib.Path) -> str:
    """The oldest Go version that a go.mod accepts, such as 1.26.6.

    Raises:
        BuildError: the file does not say.
    """
    found = re.search(r"^go (\S+)", go_mod.read_text(), re.MULTILINE)
    if not found:
        raise BuildError(f"{go_mod} has no line `go VERSION`: restore the file from version control")
    return found.group(1)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _go_environment() -> dict[str, str]:
    # A user's GOFLAGS and workspace file would change the result without changing the key.
    return {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off"}


def _home(project: Project, store: pathlib.Path) -> pathlib.Path:
    return store / f"{project.name}-{project_key(project)}"


def _ensure_project(project: Project, programs: Set[str], store: pathlib.Path, progress: Progress) -> None:
    home = _home(project, store)
    if all((home / program).exists() for program in programs):
        return
    with locked(store / f"{project.name}.lock", progress):
        missing = [program for program in project.programs if program in programs and not (home / program).exists()]
        if missing:
            _check_disk(toolchain(project.folder).build_cache, store)
        for program in missing:
            _build(project, program, home / program, progress)


def _check_disk(build_cache: pathlib.Path, store: pathlib.Path) -> None:
    # A warm build cache has most of it already; then only the programs themselves are written.
    warm = (build_cache / "trim.txt").exists()
    needed = DISK_NEEDED_BYTES // 4 if warm else DISK_NEEDED_BYTES
    for place in (build_cache, store):
        check_disk(place, needed, "move GOCACHE and MLX_OPERATOR_CACHE to a larger disk")


def _build(project: Project, program: str, target: pathlib.Path, progress: Progress) -> None:
    started = time.monotonic()
    progress(f"{program}: building with {toolchain(project.folder).version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    build = functools.partial(
        run,
        ["go", "build", *BUILD_FLAGS, "-ldflags", link_flags(project), "-o", unfinished, project.programs[program]],
        what=f"building {program}",
        progress=progress,
        remedy="read what Go says (a module that cannot be fetched: check GOPROXY) and run this again",
        deadline_seconds=BUILD_DEADLINE_SECONDS,
        cwd=project.folder,
        env=_go_environment(),
    )
    try:
        persistently(build, progress, worth=_NETWORK_TROUBLE)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    progress(f"{program}: built in {time.monotonic() - started:.1f} s")


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    # One folder for PATH and for the CNI plugins; made of links, each put in place at once.
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(source)
    unfinished.replace(target)


def main() -> int:
    """The command line: builds all programs, or those named, and prints their folder."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster.binaries", description="Build the cluster's programs."
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="build only these (default: all)")
    chosen = set(parser.parse_args().programs)
    try:
        folder = ensure(lambda line: print(line, file=sys.stderr, flush=True), only=chosen or PROGRAMS)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
