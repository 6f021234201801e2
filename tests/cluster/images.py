"""Makes every image that the local cluster runs, with nothing pulled: Debian packages, pip, and our own programs.

Each function returns an OCI layout folder whose one image carries its full name, and does nothing when the inputs of
that image are unchanged. By hand: `python -m tests.cluster.images [all|system|base|operator|runner|demo-model]`.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable

from hack.requirements import requirements_of
from tests.cluster import binaries, oci
from tests.cluster.buildah import Store, check_prerequisites
from tests.cluster.buildcache import REPOSITORY, BuildError, Progress, key_of, key_of_files, locked, persistently, run
from tests.cluster.paths import cache_root

PAUSE, COREDNS, BASE = "localhost/pause:1", "localhost/coredns:1", "localhost/base:1"
OPERATOR, RUNNER = "localhost/mlx-operator:dev", "localhost/mlx-runner:dev"
DEMO_MODEL = "localhost/demo-model:1"
DEMO_MODEL_SOURCE = REPOSITORY / "examples" / "demo_model"

_BASE_DEADLINE_SECONDS = 900.0
_TRAINING_DEADLINE_SECONDS = 900.0
_LAYOUTS_KEPT = 2
_MMDEBSTRAP = (
    "mmdebstrap",
    "--quiet",
    "--format=tar",
    "--variant=minbase",
    "--include=python3-venv,ca-certificates",
    *(f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("doc", "man", "locale")),
    # Names of the building host; and `python`, which the images that other people use as a base all have.
    '--customize-hook=rm -f "$1/etc/resolv.conf" "$1/etc/hostname"; ln -sf python3 "$1/usr/bin/python"',
    "trixie",
)
_BASE_CONFIG = {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An image with a Dockerfile in this repository, and what that file copies."""

    name: str
    dockerfile: str
    extras: tuple[str, ...]
    sources: tuple[str, ...]


RECIPES = {
    OPERATOR: Recipe(OPERATOR, "operator/Dockerfile", ("operator",), ("api/mlx_operator_api", "operator/mlx_operator")),
    RUNNER: Recipe(
        RUNNER, "runner_image/Dockerfile", ("runner", "cpu"), ("api/mlx_operator_api", "runner_image/mlx_runner")
    ),
}


def ensure_system(progress: Progress) -> dict[str, pathlib.Path]:
    """Layouts of the images that Kubernetes itself needs: `pause` and `coredns`, each one static program."""
    configs: dict[str, tuple[str, oci.ImageConfig]] = {
        "pause": (PAUSE, {"Entrypoint": ["/pause"], "User": "65535:65535"}),
        "coredns": (COREDNS, {"Entrypoint": ["/coredns"]}),
    }
    programs = binaries.ensure(progress, only=configs.keys())
    layouts = {}
    for program, (name, config) in configs.items():
        target = _home(name, key_of([binaries.program_key(program), repr(config)]))
        if not target.exists():
            with locked(_lock(name), progress):
                _write(target, name, _one_program(programs / program), config)
        layouts[program] = target
    return layouts


def ensure_base(progress: Progress) -> pathlib.Path:
    """Layout of a small Debian with Python: the base of our images where python:3.13-slim cannot be pulled."""
    target = _home(BASE, _base_key())
    if target.exists():
        return target
    check_prerequisites(_root())
    with locked(_lock(BASE), progress):
        if not target.exists():
            started = time.monotonic()
            progress(f"{BASE}: installing Debian with Python in a folder (half a minute, once)")
            _write(target, BASE, lambda tar: _bootstrap(tar, progress), _BASE_CONFIG)
            progress(f"{BASE}: made in {time.monotonic() - started:.0f} s")
    return target


def ensure_operator(progress: Progress) -> pathlib.Path:
    """Layout of the operator's image, from operator/Dockerfile."""
    return _ensure_built(RECIPES[OPERATOR], progress)


def ensure_runner(progress: Progress) -> pathlib.Path:
    """Layout of the runner's image for CPU, from runner_image/Dockerfile."""
    return _ensure_built(RECIPES[RUNNER], progress)


def ensure_model(progress: Progress, directory: pathlib.Path, name: str) -> pathlib.Path:
    """Layout of an image that holds nothing but a model's files at its root, for an `oci://` image volume.

    Args:
        progress: told when something is written.
        directory: the model, as mlx-lm reads it.
        name: the image's full name with its tag.

    Raises:
        BuildError: the directory has no config.json.
    """
    if not (directory / "config.json").is_file():
        raise BuildError(f"{directory} holds no model (it has no config.json): give the folder that mlx-lm would load")
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    # Times stand for contents here: reading tens of gigabytes to find that nothing changed would take minutes.
    stats = [f"{file.relative_to(directory)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    target = _home(name, key_of([str(directory.resolve()), *stats]))
    if not target.exists():
        with locked(_lock(name), progress):
            progress(f"{name}: packing {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")
            _write(target, name, lambda tar: oci.tar_folder(directory, tar), {})
    return target


def ensure_demo_model(progress: Progress) -> tuple[pathlib.Path, pathlib.Path]:
    """Trains the demo model once and returns its folder and the layout of its image."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm", "tokenizers")]
    sources = [file for file in DEMO_MODEL_SOURCE.iterdir() if file.suffix in {".py", ".json"}]
    models = cache_root() / "models"
    model = models / f"demo-model-{key_of([key_of_files(DEMO_MODEL_SOURCE, sources), *versions])}"
    if not model.exists():
        with locked(models / "demo-model.lock", progress):
            if not model.exists():
                _train(model, progress)
    return model, ensure_model(progress, model, DEMO_MODEL)


def _train(model: pathlib.Path, progress: Progress) -> None:
    started = time.monotonic()
    progress("demo model: training (15 to 25 s with OpenBLAS, minutes without)")
    unfinished = model.with_name(f".{model.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    said = run(
        [sys.executable, DEMO_MODEL_SOURCE / "train.py", unfinished],
        what="training the demo model",
        progress=progress,
        remedy="run `python examples/demo_model/train.py OUT` to see all of it",
        deadline_seconds=_TRAINING_DEADLINE_SECONDS,
    )
    unfinished.replace(model)
    progress(f"demo model: trained in {time.monotonic() - started:.0f} s; {said.strip().splitlines()[-1]}")


def recipe_key(recipe: Recipe) -> str:
    """The key of everything that decides an image's content: Dockerfile, dependency list, our code, the base."""
    dockerfile = REPOSITORY / recipe.dockerfile
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    files = [dockerfile, REPOSITORY / ".dockerignore"]
    for source in recipe.sources:
        files += [
            file for file in (REPOSITORY / source).rglob("*") if file.is_file() and "__pycache__" not in file.parts
        ]
    return key_of([_base_key(), *requirements_of(pyproject, recipe.extras), key_of_files(REPOSITORY, files)])


def _ensure_built(recipe: Recipe, progress: Progress) -> pathlib.Path:
    target = _home(recipe.name, recipe_key(recipe))
    if target.exists():
        return target
    check_prerequisites(_root())
    base = ensure_base(progress)
    store = Store(_root() / "store")
    with locked(_root() / "store.lock", progress):
        if not target.exists():
            started = time.monotonic()
            progress(f"{recipe.name}: building {recipe.dockerfile} (a minute the first time, then seconds)")
            arguments = {"BASE": store.load(base, "base")}
            store.build(REPOSITORY / recipe.dockerfile, recipe.name, arguments, progress)
            store.export(recipe.name, target, _newest(recipe.name))
            _drop_old(recipe.name)
            progress(f"{recipe.name}: built in {time.monotonic() - started:.1f} s")
    return target


def _base_key() -> str:
    return key_of([*_MMDEBSTRAP, repr(_BASE_CONFIG)])


def _bootstrap(tar: pathlib.Path, progress: Progress) -> None:
    install = functools.partial(
        run,
        [*_MMDEBSTRAP, tar],
        what="installing Debian in a folder",
        progress=progress,
        remedy="check that this machine reaches Debian's packages and run this again",
        deadline_seconds=_BASE_DEADLINE_SECONDS,
    )
    persistently(install, progress)


def _one_program(program: pathlib.Path) -> oci.WriteLayer:
    def write(tar: pathlib.Path) -> None:
        oci.tar_files({program.name: program}, tar)

    return write


def _write(target: pathlib.Path, name: str, layer: oci.WriteLayer, config: oci.ImageConfig) -> None:
    if not target.exists():
        oci.write_image(target, name, layer, config)
        _drop_old(name)


def _root() -> pathlib.Path:
    return cache_root() / "images"


def _slug(name: str) -> str:
    return name.rpartition("/")[2].replace(":", "-")


def _lock(name: str) -> pathlib.Path:
    return _root() / f"{_slug(name)}.lock"


def _home(name: str, key: str) -> pathlib.Path:
    return _root() / "layouts" / _slug(name) / key


def _by_age(name: str) -> list[pathlib.Path]:
    """The layouts of an image, newest first."""
    folder = _root() / "layouts" / _slug(name)
    layouts = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    return sorted(layouts, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _newest(name: str) -> pathlib.Path | None:
    return next(iter(_by_age(name)), None)


def _drop_old(name: str) -> None:
    # The one before stays: another process may still be reading it, and a change that is undone finds it.
    for layout in _by_age(name)[_LAYOUTS_KEPT:]:
        shutil.rmtree(layout)


def _all(progress: Progress) -> Iterable[pathlib.Path]:
    return [
        *ensure_system(progress).values(),
        ensure_operator(progress),
        ensure_runner(progress),
        ensure_demo_model(progress)[1],
    ]


_CHOICES: dict[str, Callable[[Progress], Iterable[pathlib.Path]]] = {
    "all": _all,
    "system": lambda progress: ensure_system(progress).values(),
    "base": lambda progress: [ensure_base(progress)],
    "operator": lambda progress: [ensure_operator(progress)],
    "runner": lambda progress: [ensure_runner(progress)],
    "demo-model": lambda progress: [ensure_demo_model(progress)[1]],
}


def main() -> int:
    """The command line: makes the images asked for and prints their layouts, one a line."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.images", description="Make the cluster's images.")
    parser.add_argument("image", nargs="?", choices=_CHOICES, default="all")
    chosen = parser.parse_args().image
    try:
        for layout in _CHOICES[chosen](lambda line: print(line, file=sys.stderr, flush=True)):
            print(layout)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
