"""Writes OCI image layouts of one layer, without a container engine: enough for `FROM scratch` images.

Layers are plain tar, not compressed: a node on the same machine reads them faster than it could decompress them. The
same content gives the same digests, so a node that has a layer is never given it again.
"""

import hashlib
import json
import pathlib
import platform
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any

from tests.cluster.buildcache import BuildError

REF_NAME = "org.opencontainers.image.ref.name"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_CHUNK = 1 << 20

WriteLayer = Callable[[pathlib.Path], None]
ImageConfig = Mapping[str, object]


def architecture() -> str:
    """This machine's architecture in OCI's words.

    Raises:
        BuildError: MLX has no wheels for it.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise BuildError(f"this machine is a {machine}, and MLX runs on Linux {known} only: use one of those")
    return _ARCHITECTURES[machine]


def write_image(target: pathlib.Path, name: str, layer: WriteLayer, config: ImageConfig) -> None:
    """Writes a layout folder that holds one image, in place only when it is whole.

    Args:
        target: the folder; it must not exist.
        name: the image's full name with its tag, such as localhost/pause:1.
        layer: writes the tar of the image's files to the path that it is given.
        config: the image's `config` object: Entrypoint, Env, User and so on.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as scratch:
        layout = pathlib.Path(scratch) / "layout"
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        tar = blobs / "layer"
        layer(tar)
        content = _adopt(tar, _LAYER)
        image = {
            "architecture": architecture(),
            "os": "linux",
            "config": dict(config),
            "rootfs": {"type": "layers", "diff_ids": [content["digest"]]},
            # buildah builds on an image only when its history accounts for every layer.
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": f"tests.cluster.oci: {name}"}],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": _add(blobs, image, _CONFIG),
            "layers": [content],
        }
        write_index(layout, name, _add(blobs, manifest, _MANIFEST))
        layout.replace(target)


def write_index(layout: pathlib.Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Makes a manifest (its descriptor) the one image of a layout, under its full name."""
    descriptor = {**manifest, "annotations": {REF_NAME: name}}
    index = {"schemaVersion": 2, "manifests": [descriptor]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))


def manifest_of(layout: pathlib.Path) -> dict[str, Any]:
    """The descriptor of the one manifest in a layout.

    Raises:
        BuildError: the layout holds none, or several.
    """
    manifests = json.loads((layout / "index.json").read_text())["manifests"]
    if len(manifests) != 1:
        raise BuildError(f"{layout} holds {len(manifests)} images instead of one: delete the folder and run this again")
    return dict(manifests[0])


def referenced_blobs(layout: pathlib.Path) -> list[str]:
    """Digests (sha256:…) that the image of a layout needs: its manifest, its config, then its layers in order."""
    digest = str(manifest_of(layout)["digest"])
    manifest = json.loads(blob(layout, digest).read_text())
    return [digest, manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]


def blob(layout: pathlib.Path, digest: str) -> pathlib.Path:
    """Where a layout keeps a blob."""
    return layout / "blobs" / pathlib.Path(*digest.split(":"))


def tar_files(files: Mapping[str, pathlib.Path], target: pathlib.Path) -> None:
    """Writes a tar that depends on names, contents and execute bits only: not on times, owners or links.

    Args:
        files: the path in the image of each file; a symbolic link becomes the file that it leads to.
        target: the tar.
    """
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in sorted(files.items()):
            status = path.stat()
            entry = tarfile.TarInfo(name)
            entry.size = status.st_size
            entry.mode = 0o755 if status.st_mode & 0o111 else 0o644
            with path.open("rb") as content:
                tar.addfile(entry, content)


def tar_folder(folder: pathlib.Path, target: pathlib.Path) -> None:
    """`tar_files` of every file under a folder, named relative to it."""
    tar_files({path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}, target)


def _adopt(file: pathlib.Path, media_type: str) -> dict[str, Any]:
    with file.open("rb") as content:
        digest, size = _digest(content)
    file.replace(file.with_name(digest))
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}


def _add(blobs: pathlib.Path, content: Mapping[str, Any], media_type: str) -> dict[str, Any]:
    file = blobs / "unnamed"
    file.write_text(json.dumps(content))
    return _adopt(file, media_type)


def _digest(content: IO[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := content.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def link_blobs(source: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a new layout the blobs of an older one, so that unchanged layers are not written again."""
    (target / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    for digest in referenced_blobs(source):
        blob(target, digest).hardlink_to(blob(source, digest))


def drop_unreferenced(layout: pathlib.Path) -> None:
    """Deletes the blobs that the one image of a layout does not need."""
    needed = set(referenced_blobs(layout))
    for file in (layout / "blobs" / "sha256").iterdir():
        if f"sha256:{file.name}" not in needed:
            file.unlink()
