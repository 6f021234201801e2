"""Read image archives, and write thin ones: OCI archives that lack the blobs the reader already has.

Understood are OCI layouts (a folder, or a tar of one) and docker-archives (what `docker save` and `buildah push
docker-archive:` write). A docker-archive is given OCI manifests on the fly; its layers keep their bytes.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.cluster.errors import ClusterError

# containerd's own annotation holds a full name; OCI's may hold a full name or only a tag.
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
_OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Blob:
    """A piece of an image: either a file of the archive or, for what this module made up, its bytes."""

    size: int
    path: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class Image:
    """An image of an archive.

    Attributes:
        name: full name, such as ``localhost/pause:1``.
        descriptor: OCI descriptor of its manifest or index.
        blobs: what the archive holds of it, by digest.
        layers: digests of the layers that must be there, in the archive or on the node.
    """

    name: str
    descriptor: Mapping[str, Any]
    blobs: Mapping[str, Blob]
    layers: tuple[str, ...]


class Archive:
    """An image archive that can be read more than once.

    Args:
        path: a layout folder, an OCI archive or a docker-archive.

    Raises:
        ClusterError: it is none of these, or an image in it has no full name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._sizes = dict(_sizes(path))
        except FileNotFoundError as error:
            raise ClusterError(f"Image archive {path}: no such file or folder; build the image first.") from error
        except tarfile.TarError as error:
            raise ClusterError(
                f"Image archive {path} is neither a folder nor a tar: give an OCI layout or an archive."
            ) from error
        with self._opened() as files:
            if "index.json" in self._sizes:
                self.images = self._oci(files)
            elif "manifest.json" in self._sizes:
                self.images = self._docker(files)
            else:
                raise ClusterError(
                    f"Image archive {path} has neither index.json (OCI) nor manifest.json (docker-archive); write it "
                    "with `buildah push IMAGE oci-archive:FILE:NAME` or `docker save`."
                )

    def write_thin(self, out: IO[bytes], present: Collection[str]) -> int:
        """Write an OCI archive with everything but the blobs in ``present``; return the number of blob bytes written.

        Raises:
            ClusterError: a layer is neither in this archive nor in ``present``.
        """
        written: dict[str, Blob] = {}
        for image in self.images:
            if lost := [layer for layer in image.layers if layer not in image.blobs and layer not in present]:
                raise ClusterError(f"Image archive {self.path} lacks layer {lost[0]} of {image.name}: write it again.")
            written |= {digest: blob for digest, blob in image.blobs.items() if digest not in present}
        index = {"schemaVersion": 2, "manifests": [_named(image) for image in self.images]}
        with tarfile.open(fileobj=out, mode="w|") as tar, self._opened() as files:
            _add(tar, "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
            for digest, blob in written.items():
                entry = tarfile.TarInfo(f"blobs/{digest.replace(':', '/')}")
                entry.size = blob.size
                with files.open(blob.path) if blob.path else io.BytesIO(blob.data) as content:
                    tar.addfile(entry, content)
            _add(tar, "index.json", json.dumps(index).encode())
        return sum(blob.size for blob in written.values())

    @contextmanager
    def _opened(self) -> Iterator["_Files"]:
        if self.path.is_dir():
            yield _Files(self.path, None)
            return
        with tarfile.open(self.path) as tar:
            yield _Files(self.path, tar)

    def _oci(self, files: "_Files") -> list[Image]:
        images = []
        for descriptor in json.loads(files.read("index.json"))["manifests"]:
            annotations = descriptor.get("annotations", {})
            name = next((annotations[key] for key in _NAMES if key in annotations), "")
            blobs: dict[str, Blob] = {}
            layers = self._collect(files, descriptor, blobs)
            images.append(Image(self._full_name(name), _plain(descriptor), blobs, tuple(layers)))
        return images

    def _collect(self, files: "_Files", descriptor: Mapping[str, Any], blobs: dict[str, Blob]) -> list[str]:
        """Add what an OCI descriptor leads to, and return the layers that it needs."""
        if not self._adopt(descriptor, blobs):
            # An index may name the images of other machines, which an archive need not hold.
            return []
        document = json.loads(files.read(_path(descriptor["digest"])))
        if descriptor.get("mediaType") in _INDEXES or "manifests" in document:
            return [layer for child in document["manifests"] for layer in self._collect(files, child, blobs)]
        self._adopt(document["config"], blobs)
        for layer in document["layers"]:
            self._adopt(layer, blobs)
        return [layer["digest"] for layer in document["layers"]]

    def _adopt(self, descriptor: Mapping[str, Any], blobs: dict[str, Blob]) -> bool:
        path = _path(descriptor["digest"])
        if path not in self._sizes:
            return False
        blobs[descriptor["digest"]] = Blob(self._sizes[path], path=path)
        return True

    def _docker(self, files: "_Files") -> list[Image]:
        images = []
        for entry in json.loads(files.read("manifest.json")):
            config = files.read(entry["Config"])
            diff_ids = json.loads(config)["rootfs"]["diff_ids"]
            blobs: dict[str, Blob] = {}
            layers = [
                self._docker_layer(files, path, diff_id, blobs)
                for path, diff_id in zip(entry["Layers"], diff_ids, strict=True)
            ]
            manifest = {
                "schemaVersion": 2,
                "mediaType": _OCI_MANIFEST,
                "config": _made(config, _OCI_CONFIG, blobs),
                "layers": layers,
            }
            descriptor = _made(json.dumps(manifest).encode(), _OCI_MANIFEST, blobs)
            digests = tuple(layer["digest"] for layer in layers)
            images += [
                Image(self._full_name(name), descriptor, blobs, digests) for name in entry.get("RepoTags") or [""]
            ]
        return images

    def _docker_layer(self, files: "_Files", path: str, diff_id: str, blobs: dict[str, Blob]) -> dict[str, Any]:
        with files.open(path) as content:
            compressed = content.read(2) == _GZIP
            size = content.seek(0, os.SEEK_END)
            content.seek(0)
            # The configuration names the digest of each uncompressed layer, so that only compressed ones must be read.
            digest = _digest(content) if compressed else diff_id
        blobs[digest] = Blob(size, path=path)
        return {"mediaType": _OCI_LAYER + ("+gzip" if compressed else ""), "digest": digest, "size": size}

    def _full_name(self, name: str) -> str:
        if ":" not in name.rpartition("/")[2] and "@" not in name:
            raise ClusterError(
                f"Image archive {self.path}: the image's name is {name!r}, which has no tag or no repository; write "
                f"the archive with a full name such as localhost/NAME:TAG (annotation {_NAMES[1]})."
            )
        return normalized(name)


class _Files:
    """The files of a layout folder, or of a tar."""

    def __init__(self, path: Path, tar: tarfile.TarFile | None) -> None:
        self._path = path
        self._tar = tar

    def open(self, name: str) -> IO[bytes]:
        if self._tar is None:
            return (self._path / name).open("rb")
        # Follows links inside the archive, which docker-archives have.
        content = self._tar.extractfile(self._tar.getmember(_member(self._tar, name)))
        if content is None:
            raise ClusterError(f"Image archive {self._path}: {name} is not a file.")
        return content

    def read(self, name: str) -> bytes:
        with self.open(name) as content:
            return content.read()


def normalized(name: str) -> str:
    """Return an image name as containerd knows it: names without a registry belong to docker.io."""
    first, slash, _ = name.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        return name
    return f"docker.io/{name}" if slash else f"docker.io/library/{name}"


def _sizes(path: Path) -> Iterator[tuple[str, int]]:
    if path.is_dir():
        for file in path.rglob("*"):
            if file.is_file():
                yield file.relative_to(path).as_posix(), file.stat().st_size
        return
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.isdir():
                yield member.name.removeprefix("./"), member.size


def _member(tar: tarfile.TarFile, name: str) -> str:
    return name if name in tar.getnames() else f"./{name}"


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _plain(descriptor: Mapping[str, Any]) -> dict[str, Any]:
    return {key: descriptor[key] for key in ("mediaType", "digest", "size") if key in descriptor}


def _named(image: Image) -> dict[str, Any]:
    return {**image.descriptor, "annotations": dict.fromkeys(_NAMES, image.name)}


def _made(data: bytes, media_type: str, blobs: dict[str, Blob]) -> dict[str, Any]:
    digest = _digest(io.BytesIO(data))
    blobs[digest] = Blob(len(data), data=data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _digest(content: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
