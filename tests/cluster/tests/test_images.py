"""The images' builder: keys, layouts, and what a change of our code costs."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

from hack.requirements import main as print_requirements
from hack.requirements import requirements_of
from tests.cluster import buildah, images, oci
from tests.cluster.buildah import Store
from tests.cluster.buildcache import REPOSITORY, BuildError

PYPROJECT = """
[project]
name = "thing"
dependencies = ["shared>=1"]
[project.optional-dependencies]
server = ["web>=2", "shared>=1"]
gpu = ["fast[gpu]>=3"]
dev = ["thing[server, gpu]", "tests>=4"]
"""
needs_buildah = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("buildah") is None, reason="buildah in a chroot needs root and buildah"
)


def layers(layout: pathlib.Path) -> list[dict[str, object]]:
    manifest = json.loads(oci.blob(layout, oci.manifest_of(layout)["digest"]).read_text())
    return list(manifest["layers"])


def names_in(tar: pathlib.Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(tar) as opened:
        return {entry.name: entry for entry in opened}


class TestRequirements:
    def test_an_extra_lists_its_own_and_the_shared_requirements_once(self) -> None:
        assert requirements_of(PYPROJECT, ["server"]) == ["shared>=1", "web>=2"]

    def test_several_extras_are_merged(self) -> None:
        assert requirements_of(PYPROJECT, ["server", "gpu"]) == ["fast[gpu]>=3", "shared>=1", "web>=2"]

    def test_an_extra_that_names_the_project_is_followed(self) -> None:
        assert requirements_of(PYPROJECT, ["dev"]) == ["fast[gpu]>=3", "shared>=1", "tests>=4", "web>=2"]

    def test_an_unknown_extra_is_an_error_that_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match=r"extra 'sever' is not in pyproject\.toml: choose from dev, gpu, server"):
            requirements_of(PYPROJECT, ["sever"])

    def test_the_command_ends_with_2_and_no_list_for_an_unknown_extra(
        self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "pyproject.toml").write_text(PYPROJECT)
        assert print_requirements([str(tmp_path / "pyproject.toml"), "server"]) == 0
        assert capsys.readouterr().out == "shared>=1\nweb>=2\n"
        assert print_requirements([str(tmp_path / "pyproject.toml"), "sever"]) == 2
        assert capsys.readouterr().out == ""

    def test_every_extra_that_an_image_installs_exists(self) -> None:
        pyproject = (REPOSITORY / "pyproject.toml").read_text()
        for recipe in images.RECIPES.values():
            assert requirements_of(pyproject, recipe.extras)


class TestLayouts:
    def test_a_layout_names_its_image_in_full_and_every_digest_is_true(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "file").write_text("content")
        layout = tmp_path / "layout"
        oci.write_image(
            layout, "localhost/x:1", lambda tar: oci.tar_files({"file": tmp_path / "file"}, tar), {"User": "1"}
        )
        assert oci.manifest_of(layout)["annotations"] == {"org.opencontainers.image.ref.name": "localhost/x:1"}
        blobs = sorted((layout / "blobs" / "sha256").iterdir())
        assert {f"sha256:{blob.name}" for blob in blobs} == set(oci.referenced_blobs(layout))
        for blob in blobs:
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
        config = json.loads(oci.blob(layout, oci.referenced_blobs(layout)[1]).read_text())
        assert config["config"] == {"User": "1"}
        assert config["rootfs"]["diff_ids"] == [layers(layout)[0]["digest"]]

    def test_the_same_files_give_the_same_layer_whatever_their_times(self, tmp_path: pathlib.Path) -> None:
        for name, when in (("a", 1), ("b", 2)):
            (tmp_path / name / "sub").mkdir(parents=True)
            (tmp_path / name / "sub" / "file").write_text("content")
            os.utime(tmp_path / name / "sub" / "file", (when, when))
            oci.tar_folder(tmp_path / name, tmp_path / f"{name}.tar")
        assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()

    def test_a_link_in_a_model_folder_becomes_the_file_that_it_leads_to(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "blob").write_text("weights")
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(tmp_path / "blob")
        oci.tar_folder(folder, tmp_path / "layer.tar")
        assert names_in(tmp_path / "layer.tar")["model.safetensors"].size == len("weights")

    def test_a_program_stays_executable(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "pause").write_text("#!")
        (tmp_path / "pause").chmod(0o700)
        (tmp_path / "data").write_text("")
        oci.tar_files({"pause": tmp_path / "pause", "data": tmp_path / "data"}, tmp_path / "layer.tar")
        entries = names_in(tmp_path / "layer.tar")
        assert (entries["pause"].mode, entries["data"].mode) == (0o755, 0o644)

    def test_a_layer_that_cannot_be_written_leaves_no_layout(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError):
            oci.write_image(tmp_path / "x", "localhost/x:1", lambda tar: oci.tar_files({"f": tmp_path / "f"}, tar), {})
        assert list(tmp_path.iterdir()) == []


class TestModels:
    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLX_OPERATOR_CACHE", str(tmp_path / "cache"))

    def test_a_model_is_packed_once_and_again_after_a_change(self, tmp_path: pathlib.Path) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text("{}")
        lines: list[str] = []
        first = images.ensure_model(lines.append, model, "localhost/m:1")
        assert images.ensure_model(lines.append, model, "localhost/m:1") == first
        assert len(lines) == 1
        assert list(names_in(oci.blob(first, str(layers(first)[0]["digest"])))) == ["config.json"]
        (model / "config.json").write_text('{"model_type": "qwen2"}')
        assert images.ensure_model(lines.append, model, "localhost/m:1") != first

    def test_only_the_last_two_layouts_of_an_image_are_kept(self, tmp_path: pathlib.Path) -> None:
        model = tmp_path / "model"
        model.mkdir()
        made = []
        for size in range(1, 5):
            (model / "config.json").write_text(" " * size)
            made.append(images.ensure_model(print, model, "localhost/m:1"))
        assert [layout.exists() for layout in made] == [False, False, True, True]

    def test_a_folder_without_a_model_is_refused_by_name(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(BuildError, match=rf"{tmp_path} holds no model \(it has no config\.json\)"):
            images.ensure_model(print, tmp_path, "localhost/m:1")


class TestKeys:
    @pytest.fixture
    def checkout(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
        for folder in ("api/mlx_operator_api", "operator/mlx_operator"):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / "code.py").write_text("x = 1\n")
        for file in ("operator/Dockerfile", ".dockerignore", "pyproject.toml"):
            shutil.copyfile(REPOSITORY / file, tmp_path / file)
        monkeypatch.setattr(images, "REPOSITORY", tmp_path)
        return tmp_path

    def test_our_code_the_dockerfile_and_the_dependencies_change_the_key(self, checkout: pathlib.Path) -> None:
        keys = {images.recipe_key(images.RECIPES[images.OPERATOR])}
        (checkout / "operator/mlx_operator/code.py").write_text("x = 2\n")
        keys.add(images.recipe_key(images.RECIPES[images.OPERATOR]))
        (checkout / "operator/Dockerfile").write_text("FROM scratch\n")
        keys.add(images.recipe_key(images.RECIPES[images.OPERATOR]))
        pyproject = (checkout / "pyproject.toml").read_text()
        (checkout / "pyproject.toml").write_text(pyproject.replace('"kopf>=', '"kopf!=1.44,>='))
        keys.add(images.recipe_key(images.RECIPES[images.OPERATOR]))
        assert len(keys) == 4

    def test_caches_times_and_the_rest_of_pyproject_do_not(self, checkout: pathlib.Path) -> None:
        key = images.recipe_key(images.RECIPES[images.OPERATOR])
        os.utime(checkout / "operator/mlx_operator/code.py", (1, 1))
        (checkout / "api/mlx_operator_api/__pycache__").mkdir()
        (checkout / "api/mlx_operator_api/__pycache__/code.pyc").write_bytes(b"\0")
        with (checkout / "pyproject.toml").open("a") as pyproject:
            pyproject.write("\n[tool.something]\nelse = true\n")
        assert images.recipe_key(images.RECIPES[images.OPERATOR]) == key


class TestBuildah:
    @needs_buildah
    def test_a_change_of_code_changes_exactly_the_last_layer_and_no_change_changes_none(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = tmp_path / "context"
        (context / "app").mkdir(parents=True)
        (context / "dependencies").write_text("heavy")
        (context / "app" / "code.py").write_text("x = 1\n")
        (context / "Dockerfile").write_text(
            "ARG BASE\nFROM ${BASE}\nCOPY dependencies /dependencies\nCOPY app /app\nUSER 65532:65532\n"
        )
        (context / ".dockerignore").write_text("**/__pycache__\n")
        monkeypatch.setattr(buildah, "REPOSITORY", context)
        base = tmp_path / "base"
        oci.write_image(base, "localhost/base:1", lambda tar: oci.tar_folder(context / "app", tar), {})
        store = Store(tmp_path / "store")
        arguments = {"BASE": store.load(base, "base")}

        def build(target: str, older: pathlib.Path | None) -> pathlib.Path:
            store.build(context / "Dockerfile", "localhost/thing:dev", arguments, print)
            store.export("localhost/thing:dev", tmp_path / target, older)
            return tmp_path / target

        try:
            first = build("first", None)
            os.utime(context / "dependencies", (1, 1))
            same = build("same", first)
            (context / "app" / "code.py").write_text("x = 2\n")
            changed = build("changed", same)
        finally:
            store.change("rmi", "--all", "--force")
        assert str(tmp_path) not in pathlib.Path("/proc/self/mounts").read_text()
        assert layers(same) == layers(first)
        assert [after == before for after, before in zip(layers(changed), layers(first), strict=True)] == [
            True,
            True,
            False,
        ]
        plain = "application/vnd.oci.image.layer.v1.tar"
        assert [layer["mediaType"] for layer in layers(first)] == [plain] * 3
        assert layers(first)[0]["digest"] == layers(base)[0]["digest"]
        for layout in (first, changed):
            assert oci.manifest_of(layout)["annotations"][oci.REF_NAME] == "localhost/thing:dev"
            found = {f"sha256:{blob.name}" for blob in (layout / "blobs" / "sha256").iterdir()}
            assert found == set(oci.referenced_blobs(layout))

    @needs_buildah
    def test_a_failed_step_is_shown_with_its_dockerfile_and_leaves_no_mount(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY nowhere /\n")
        (tmp_path / ".dockerignore").write_text("")
        monkeypatch.setattr(buildah, "REPOSITORY", tmp_path)
        store = Store(tmp_path / "store")
        with pytest.raises(BuildError, match=r"(?s)building localhost/x:1 failed.*Dockerfile says.*nowhere"):
            store.build(tmp_path / "Dockerfile", "localhost/x:1", {}, print)
        assert str(tmp_path) not in pathlib.Path("/proc/self/mounts").read_text()

    def test_builders_that_are_not_root_are_told_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(BuildError, match="needs root: run this as root"):
            buildah.check_prerequisites(pathlib.Path("/"))

    def test_missing_programs_are_named_with_the_command_that_installs_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(BuildError, match="apt-get install buildah mmdebstrap"):
            buildah.check_prerequisites(pathlib.Path("/"))

    def test_builds_fetch_packages_where_the_host_does_and_know_nothing_else_of_it(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = tmp_path / "bundle.pem"
        bundle.write_text("certificates")
        monkeypatch.setenv("PIP_CERT", str(bundle))
        monkeypatch.setenv("PIP_INDEX_URL", "https://packages.example.test/simple")
        monkeypatch.setenv("PIP_FIND_LINKS", "/a/folder/of/the/host")
        secrets = buildah.host_secrets(tmp_path)
        written = secrets["pip_conf"].read_text()
        assert "index-url = https://packages.example.test/simple\n" in written
        assert "cert = /etc/ssl/certs/ca-certificates.crt\n" in written
        assert "/a/folder" not in written
        assert secrets["ca_bundle"] == bundle


class TestDemoModel:
    def test_it_learns_twenty_different_questions(self) -> None:
        entries = json.loads((images.DEMO_MODEL_SOURCE / "questions.json").read_text())
        assert len({entry["question"] for entry in entries}) == len(entries) == 20
        assert len({entry["answer"] for entry in entries}) == 20

    def test_it_answers_them_and_its_check_finds_a_wrong_answer(self) -> None:
        model, layout = images.ensure_demo_model(print)
        check = (
            "import pathlib, sys\n"
            "from examples.demo_model.train import Pair, TrainingError, read_pairs, verify\n"
            "model = pathlib.Path(sys.argv[1])\n"
            "verify(model, read_pairs())\n"
            "try:\n"
            "    verify(model, [Pair('Say hello.', 'Goodbye.')])\n"
            "except TrainingError as error:\n"
            "    print(error)\n"
        )
        # A process of its own: mlx-lm lowers the number of files that a process may open.
        said = subprocess.run(
            [sys.executable, "-c", check, model],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        ).stdout
        assert "1 of 1 answers are wrong: 'Say hello.': taught 'Goodbye.', answered 'Hello!" in said
        weights = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
        packed = names_in(oci.blob(layout, str(layers(layout)[0]["digest"])))
        assert len(set(weights.values())) == 2
        assert set(weights.values()) | {"config.json", "tokenizer.json", "tokenizer_config.json"} < packed.keys()
