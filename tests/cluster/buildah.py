"""Builds Dockerfiles with buildah in a chroot (no engine, no daemon) and exports them as OCI layouts, layer by layer.

Layers are cached in a store of our own under the cache folder. An export reuses the blobs of the export before it, so
that after a change of our code only the small last layer is written.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from tests.cluster import oci
from tests.cluster.buildcache import REPOSITORY, BuildError, Progress, check_disk, key_of, run

BUILD_DEADLINE_SECONDS = 1800.0
# Base, operator and runner, once as layers of the store and once as layouts, with room for the layers being built.
DISK_NEEDED_BYTES = 4 << 30
_QUICK_DEADLINE_SECONDS = 300.0
_INSTALL = "install it with `apt-get install buildah` and run this again"
_CA_BUNDLE_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_SYSTEM_CA_BUNDLE = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")
# What decides where pip fetches from; the rest of a host's settings (caches, local folders) means nothing in a build.
_PIP_KEYS = frozenset(
    {"index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries"}
)


@dataclasses.dataclass(frozen=True)
class Store:
    """A buildah store: layers, images and the cache of build steps, in folders of our own."""

    root: pathlib.Path

    def command(self, *arguments: str | pathlib.Path) -> list[str | pathlib.Path]:
        """A buildah command line that uses this store."""
        options: list[str | pathlib.Path] = ["--root", self.root / "root", "--runroot", self.root / "run"]
        return ["buildah", *options, "--storage-driver", "overlay", *arguments]

    def query(
        self, *arguments: str | pathlib.Path, cwd: pathlib.Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a quick command and returns its answer, whatever its exit code.

        Raises:
            BuildError: buildah is not installed, or hangs.
        """
        try:
            return subprocess.run(
                self.command(*arguments),
                cwd=cwd,
                capture_output=True,
                text=True,
                timeout=_QUICK_DEADLINE_SECONDS,
                check=False,
            )
        except FileNotFoundError as error:
            raise BuildError(f"buildah is not installed, and the images are built with it: {_INSTALL}") from error
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f"buildah gave no answer in {_QUICK_DEADLINE_SECONDS:.0f} s: delete {self.root} and run this again"
            ) from error

    def change(self, *arguments: str | pathlib.Path, cwd: pathlib.Path | None = None) -> str:
        """Runs a quick command that must succeed and returns what it wrote.

        Raises:
            BuildError: it failed.
        """
        answer = self.query(*arguments, cwd=cwd)
        if answer.returncode != 0:
            raise BuildError(
                f"`buildah {arguments[0]}` failed ({answer.stderr.strip()}): if its store is damaged, "
                f"delete {self.root} and run this again"
            )
        return answer.stdout.strip()

    def load(self, layout: pathlib.Path, name: str) -> str:
        """Brings the image of an OCI layout into the store.

        Args:
            layout: the folder.
            name: what to call it, one word.

        Returns:
            The image's name in the store, which its content decides: `name` with a key.
        """
        word = f"{name}-{key_of([oci.manifest_of(layout)['digest']])}"
        image = f"localhost/{word}:latest"
        if self.query("inspect", "--type", "image", image).returncode != 0:
            # buildah names what it pulls after the folder, as it was given; not every path makes a legal name.
            with tempfile.TemporaryDirectory(prefix="mlx-operator-load-") as scratch:
                (pathlib.Path(scratch) / word).symlink_to(layout)
                self.change("pull", "-q", f"oci:{word}", cwd=pathlib.Path(scratch))
        return image

    def build(self, dockerfile: pathlib.Path, name: str, arguments: Mapping[str, str], progress: Progress) -> None:
        """Builds a Dockerfile with the repository as its context; steps whose inputs are unchanged are not run again.

        Raises:
            BuildError: a step failed; the message has its last lines.
        """
        with tempfile.TemporaryDirectory(prefix="mlx-operator-build-") as scratch:
            options = [f"--build-arg={key}={value}" for key, value in arguments.items()]
            options += [f"--secret=id={key},src={path}" for key, path in host_secrets(pathlib.Path(scratch)).items()]
            ignored = ["--ignorefile", str(REPOSITORY / ".dockerignore")]
            try:
                run(
                    self.command(
                        *("build", "--isolation", "chroot", "--layers", "--pull=never", *ignored, *options),
                        *("-t", name, "-f", dockerfile, REPOSITORY),
                    ),
                    what=f"building {name}",
                    progress=progress,
                    remedy=f"read what the failing step of {dockerfile} says, and run this again",
                    deadline_seconds=BUILD_DEADLINE_SECONDS,
                )
            finally:
                # A step that failed or was interrupted, now or in a process that was killed, left its root mounted.
                self.query("rm", "--all")

    def export(self, name: str, target: pathlib.Path, older: pathlib.Path | None) -> None:
        """Writes an image of the store as an OCI layout, in place only when it is whole.

        Args:
            name: the image, which is also the name that the layout gives it.
            target: the folder; it must not exist.
            older: a layout of the same image as it was before, if there is one.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as scratch:
            layout = pathlib.Path(scratch) / "layout"
            blobs = layout / "blobs" / "sha256"
            blobs.mkdir(parents=True)
            if older is not None:
                oci.link_blobs(older, layout)
            if not all(oci.blob(layout, layer).exists() for layer in self._layers(name)[:-1]):
                # Into a layout buildah compresses, which takes longer than all the rest; a "dir" it writes plain.
                plain = pathlib.Path(scratch) / "plain"
                self.change("push", "-q", "--disable-compression", "--format", "oci", name, f"dir:{plain}")
                for file in plain.iterdir():
                    if re.fullmatch(r"[0-9a-f]{64}", file.name):
                        file.replace(blobs / file.name)
            # Layers that are there already are taken as they are.
            self.change("push", "-q", "--format", "oci", name, f"oci:{layout}:{name}")
            oci.drop_unreferenced(layout)
            layout.replace(target)

    def _layers(self, name: str) -> list[str]:
        image = json.loads(self.change("inspect", "--type", "image", name))
        return [str(layer) for layer in image["OCIv1"]["rootfs"]["diff_ids"]]


def host_secrets(scratch: pathlib.Path) -> dict[str, pathlib.Path]:
    """What a build on this host needs to fetch packages, as build secrets: a CA bundle and a pip.conf.

    Args:
        scratch: a folder for the pip.conf, which the caller deletes.
    """
    bundles = [pathlib.Path(os.environ[name]) for name in _CA_BUNDLE_VARIABLES if os.environ.get(name)]
    bundle = next((path for path in (*bundles, _SYSTEM_CA_BUNDLE) if path.is_file()), None)
    lines = [f"{key} = {value}" for key, value in _pip_settings()]
    if bundle is not None:
        lines.append(f"cert = {_SYSTEM_CA_BUNDLE}")
    pip_conf = scratch / "pip.conf"
    pip_conf.write_text("\n".join(["[global]", *lines, ""]))
    return {"pip_conf": pip_conf, **({"ca_bundle": bundle} if bundle is not None else {})}


def _pip_settings() -> Iterator[tuple[str, str]]:
    answer = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        timeout=_QUICK_DEADLINE_SECONDS,
        check=False,
    )
    for line in answer.stdout.splitlines():
        found = re.fullmatch(r"(?:global|install|:env:)\.([a-z-]+)='(.*)'", line)
        if found and found.group(1) in _PIP_KEYS:
            yield found.group(1).removeprefix("default-"), found.group(2).replace("\\n", "\n    ")


def check_prerequisites(place: pathlib.Path) -> None:
    """Refuses to start a build that cannot end.

    Args:
        place: where images are kept.

    Raises:
        BuildError: this is not root, a program is missing, or the disk is nearly full.
    """
    if os.geteuid() != 0:
        raise BuildError("building images in a chroot needs root: run this as root (with sudo, for example)")
    missing = [program for program in ("buildah", "mmdebstrap") if shutil.which(program) is None]
    if missing:
        names = " ".join(missing)
        raise BuildError(f"not installed: {', '.join(missing)}; run `apt-get install {names}` and then this again")
    check_disk(place, DISK_NEEDED_BYTES, "move MLX_OPERATOR_CACHE to a larger disk")
