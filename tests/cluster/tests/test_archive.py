"""Reading image archives and writing thin ones."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from tests.cluster.archive import Archive, normalized
from tests.cluster.errors import ClusterError
from tests.cluster.tests.layouts import MANIFEST, digest, docker_archive, layer, oci_layout, tar_of

NAME = {"org.opencontainers.image.ref.name": "localhost/app:1"}
BASE, CODE = layer(base=b"b" * 50_000), layer(code=b"c" * 10)


def thin(archive: Archive, present: set[str]) -> dict[str, bytes]:
    out = io.BytesIO()
    archive.write_thin(out, present)
    out.seek(0)
    with tarfile.open(fileobj=out) as tar:
        contents = {member.name: tar.extractfile(member) for member in tar}
        return {name: content.read() for name, content in contents.items() if content is not None}


def blob(data: bytes) -> str:
    return f"blobs/{digest(data).replace(':', '/')}"


def test_a_layer_that_the_node_has_is_left_out_and_everything_else_is_sent(tmp_path: Path) -> None:
    files = thin(Archive(oci_layout(tmp_path / "a", [BASE, CODE], NAME)), {digest(BASE)})
    assert blob(CODE) in files
    assert blob(BASE) not in files
    assert {"oci-layout", "index.json"} <= files.keys()
    # Manifest, configuration, the small layer.
    assert sum(name.startswith("blobs/") for name in files) == 3


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_layout_and_a_tar_of_it_are_the_same_image(tmp_path: Path, prefix: str) -> None:
    folder = oci_layout(tmp_path / "a", [BASE, CODE], NAME)
    from_folder = Archive(folder)
    from_tar = Archive(tar_of(folder, tmp_path / "a.tar", prefix))
    assert from_tar.images[0].descriptor == from_folder.images[0].descriptor
    assert thin(from_tar, set()) == thin(from_folder, set())


def test_the_image_keeps_the_digest_that_it_was_built_with(tmp_path: Path) -> None:
    folder = oci_layout(tmp_path / "a", [BASE], NAME)
    built = json.loads((folder / "index.json").read_text())["manifests"][0]["digest"]
    index = json.loads(thin(Archive(folder), set())["index.json"])
    assert index["manifests"][0]["digest"] == built
    assert index["manifests"][0]["annotations"]["io.containerd.image.name"] == "localhost/app:1"


def test_a_docker_archive_gets_a_manifest_whose_layers_keep_their_bytes(tmp_path: Path) -> None:
    archive = Archive(docker_archive(tmp_path / "d.tar", [BASE, CODE], ["localhost/app:1"]))
    files = thin(archive, {digest(BASE)})
    manifest = json.loads(files[f"blobs/{archive.images[0].descriptor['digest'].replace(':', '/')}"])
    assert manifest["mediaType"] == MANIFEST
    assert [entry["digest"] for entry in manifest["layers"]] == [digest(BASE), digest(CODE)]
    assert files[blob(CODE)] == CODE
    assert blob(BASE) not in files


def test_containerds_own_annotation_wins_over_a_bare_tag(tmp_path: Path) -> None:
    annotations = {"org.opencontainers.image.ref.name": "1", "io.containerd.image.name": "localhost/app:1"}
    assert Archive(oci_layout(tmp_path / "a", [CODE], annotations)).images[0].name == "localhost/app:1"


@pytest.mark.parametrize("name", ["", "1", "localhost/app", "host:5000/app"])
def test_an_image_without_a_full_name_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    folder = oci_layout(tmp_path / "a", [CODE], {"org.opencontainers.image.ref.name": name})
    with pytest.raises(ClusterError, match=r"has no tag or no repository; write the archive with a full name"):
        Archive(folder)


def test_a_layer_that_nobody_has_is_named(tmp_path: Path) -> None:
    folder = oci_layout(tmp_path / "a", [BASE, CODE], NAME)
    (folder / blob(CODE)).unlink()
    with pytest.raises(ClusterError, match=f"lacks layer {digest(CODE)} of localhost/app:1"):
        Archive(folder).write_thin(io.BytesIO(), {digest(BASE)})
    assert blob(BASE) in thin(Archive(folder), {digest(CODE)})


def test_an_index_may_name_images_of_machines_that_the_archive_lacks(tmp_path: Path) -> None:
    folder = oci_layout(tmp_path / "a", [CODE], NAME)
    index = json.loads((folder / "index.json").read_text())
    ours = index["manifests"][0]
    absent = {"mediaType": MANIFEST, "digest": digest(b"arm64"), "size": 5}
    nested = json.dumps({"schemaVersion": 2, "manifests": [ours, absent]}).encode()
    (folder / blob(nested)).write_bytes(nested)
    descriptor = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": digest(nested), "size": len(nested)}
    index["manifests"] = [{**descriptor, "annotations": NAME}]
    (folder / "index.json").write_text(json.dumps(index))
    files = thin(Archive(folder), set())
    assert {blob(nested), blob(CODE)} <= files.keys()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file or folder"),
        (b"not a tar", "neither a folder nor a tar"),
        (layer(x=b"1"), "neither index.json"),
    ],
)
def test_what_is_no_image_archive_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "archive"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClusterError, match=says):
        Archive(path)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("busybox:1", "docker.io/library/busybox:1"),
        ("team/app:1", "docker.io/team/app:1"),
        ("localhost/app:1", "localhost/app:1"),
        ("registry.example/app:1", "registry.example/app:1"),
        ("host:5000/app:1", "host:5000/app:1"),
    ],
)
def test_names_without_a_registry_belong_to_docker_io(name: str, full: str) -> None:
    assert normalized(name) == full
