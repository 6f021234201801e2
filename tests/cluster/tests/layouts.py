"""Image archives for tests, small enough to count bytes in."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def layer(**files: bytes) -> bytes:
    """Bytes of a tar with these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config(layers: Sequence[bytes]) -> bytes:
    rootfs = {"type": "layers", "diff_ids": [digest(data) for data in layers]}
    return json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()


def oci_layout(folder: Path, layers: Sequence[bytes], annotations: dict[str, str]) -> Path:
    """Write an OCI layout folder with one image and return it."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        (blobs / digest(data).removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": put(config(layers), CONFIG),
        "layers": [put(data, LAYER) for data in layers],
    }
    descriptor = {**put(json.dumps(manifest).encode(), MANIFEST), "annotations": annotations}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def tar_of(folder: Path, target: Path, prefix: str = "") -> Path:
    """Write a folder as a tar and return the tar; a prefix of "./" is what `tar -C FOLDER .` writes."""
    with tarfile.open(target, "w") as tar:
        for file in sorted(folder.rglob("*")):
            tar.add(file, prefix + file.relative_to(folder).as_posix(), recursive=False)
    return target


def docker_archive(target: Path, layers: Sequence[bytes], tags: list[str]) -> Path:
    """Write a docker-archive with one image and return it."""
    names = [f"{index}.tar" for index in range(len(layers))]
    manifest = json.dumps([{"Config": "config.json", "RepoTags": tags, "Layers": names}]).encode()
    files = {"manifest.json": manifest, "config.json": config(layers), **dict(zip(names, layers, strict=True))}
    with tarfile.open(target, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return target
