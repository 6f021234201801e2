"""The programs' builder, with two tiny Go modules in place of the real ones."""

import collections
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.cluster import binaries, buildcache
from tests.cluster.binaries import Project
from tests.cluster.buildcache import BuildError

ONE, TWO = Project("one", {"one": "."}), Project("two", {"two": "."})
REAL_MODULES = binaries.MODULES
needs_go = pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")


def write_module(folder: pathlib.Path, says: str, go: str = "1.21") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "go.mod").write_text(f"module example.test/{folder.name}\n\ngo {go}\n")
    (folder / "main.go").write_text(f'package main\n\nfunc main() {{ println("{says}") }}\n')


@pytest.fixture
def modules(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    folder = tmp_path / "go"
    write_module(folder / "one", "first")
    write_module(folder / "two", "second")
    monkeypatch.setenv("MLX_OPERATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(binaries, "MODULES", folder)
    monkeypatch.setattr(binaries, "PROJECTS", (ONE, TWO))
    monkeypatch.setattr(binaries, "PROGRAMS", frozenset({"one", "two"}))
    binaries.toolchain.cache_clear()
    yield folder
    binaries.toolchain.cache_clear()


def built(lines: list[str]) -> list[str]:
    """The programs that these progress lines say were built."""
    return [line.partition(":")[0] for line in lines if re.search(r": built in \d", line)]


def says(program: pathlib.Path) -> str:
    return subprocess.run([program], capture_output=True, text=True, timeout=30, check=True).stderr.strip()


@needs_go
def test_programs_are_built_once_and_then_taken_from_the_cache(modules: pathlib.Path) -> None:
    first: list[str] = []
    folder = binaries.ensure(first.append, only={"one", "two"})
    assert built(first) == ["one", "two"]
    assert (says(folder / "one"), says(folder / "two")) == ("first", "second")
    again: list[str] = []
    assert binaries.ensure(again.append, only={"one", "two"}) == folder
    assert again == []


@needs_go
def test_a_changed_project_is_rebuilt_and_the_other_is_not(modules: pathlib.Path) -> None:
    binaries.ensure(print, only={"one", "two"})
    write_module(modules / "two", "changed")
    lines: list[str] = []
    folder = binaries.ensure(lines.append, only={"one", "two"})
    assert built(lines) == ["two"]
    assert (says(folder / "one"), says(folder / "two")) == ("first", "changed")


@needs_go
def test_only_the_programs_asked_for_are_built(modules: pathlib.Path) -> None:
    lines: list[str] = []
    folder = binaries.ensure(lines.append, only={"two"})
    assert built(lines) == ["two"]
    assert not (folder / "one").exists()


def test_a_program_that_the_cluster_has_not_is_refused_by_name() -> None:
    with pytest.raises(BuildError, match=r"no such program: kubelett; the cluster has .*kubelet"):
        binaries.ensure(print, only={"kubelett"})


@needs_go
def test_the_key_depends_on_inputs_and_not_on_times_or_other_files(
    modules: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = binaries.project_key(ONE)
    os.utime(modules / "one" / "main.go", (1, 1))
    (modules / "one" / "notes.txt").write_text("not an input")
    assert binaries.project_key(ONE) == key
    keys = {key}
    (modules / "one" / "go.sum").write_text("")
    keys.add(binaries.project_key(ONE))
    write_module(modules / "one", "something else")
    keys.add(binaries.project_key(ONE))
    keys.add(binaries.project_key(Project("one", {"renamed": "."})))
    monkeypatch.setattr(binaries, "LINK_FLAGS", "-s")
    keys.add(binaries.project_key(ONE))
    assert len(keys) == 5


@needs_go
def test_a_failed_build_shows_what_go_said_and_leaves_nothing_behind(modules: pathlib.Path) -> None:
    (modules / "one" / "main.go").write_text("package main\n\nfunc main() { undefinedFunction() }\n")
    with pytest.raises(
        BuildError, match=r"(?s)building one failed after \d+ s \(exit code 1\).*undefinedFunction"
    ) as error:
        binaries.ensure(print, only={"one"})
    assert "run this again" in str(error.value)
    home = next((modules.parent / "cache" / "bin").glob("one-*"))
    assert list(home.iterdir()) == []


@needs_go
def test_two_builders_at_once_build_each_program_once(modules: pathlib.Path) -> None:
    lines: list[list[str]] = [[], []]
    threads = [
        threading.Thread(target=binaries.ensure, args=(said.append,), kwargs={"only": {"one", "two"}}) for said in lines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert collections.Counter(built(lines[0] + lines[1])) == {"one": 1, "two": 1}


def test_a_missing_go_is_one_sentence_with_the_remedy(modules: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BuildError, match=r"^Go is not installed.*install Go") as error:
        binaries.ensure(print, only={"one"})
    assert "\n" not in str(error.value)


@needs_go
def test_a_go_that_is_too_old_is_told_which_version_is_needed(
    modules: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOTOOLCHAIN", "local")
    write_module(modules / "one", "first", go="1.999.0")
    with pytest.raises(BuildError, match=r"^go1\.\S+ is too old: one needs Go 1\.999\.0 or newer; install Go"):
        binaries.ensure(print, only={"one"})


@needs_go
def test_a_full_disk_is_found_before_anything_is_built(modules: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    lines: list[str] = []
    with pytest.raises(BuildError, match=r"0\.0 GiB free and this needs about \d.*MLX_OPERATOR_CACHE"):
        binaries.ensure(lines.append, only={"one"})
    assert lines == []


@needs_go
def test_kubernetes_programs_are_told_the_version_that_their_go_mod_requires() -> None:
    kubernetes = next(project for project in binaries.PROJECTS if project.name == "kubernetes")
    version = binaries.required_version(REAL_MODULES / "kubernetes" / "go.mod", "k8s.io/kubernetes")
    flags = binaries.link_flags(kubernetes)
    assert re.fullmatch(r"v1\.\d+\.\d+", version)
    assert f"k8s.io/component-base/version.gitVersion={version}" in flags
    assert f"k8s.io/client-go/pkg/version.gitMinor={version.split('.')[1]}" in flags


def test_a_go_mod_without_the_module_is_an_error_that_names_both(tmp_path: pathlib.Path) -> None:
    (tmp_path / "go.mod").write_text("module example.test/x\n")
    with pytest.raises(BuildError, match=r"go\.mod requires no version of k8s\.io/kubernetes"):
        binaries.required_version(tmp_path / "go.mod", "k8s.io/kubernetes")


def test_every_program_comes_from_a_module_that_lists_it_as_a_tool() -> None:
    for project in binaries.PROJECTS:
        go_mod = (REAL_MODULES / project.name / "go.mod").read_text()
        for package in project.programs.values():
            assert package == "." or re.search(rf"^(tool |\t){re.escape(package)}$", go_mod, re.MULTILINE), package


def test_module_files_name_no_host_to_fetch_from() -> None:
    for file in REAL_MODULES.glob("*/go.*"):
        assert "://" not in file.read_text(), file


def test_a_lock_that_is_never_released_ends_in_an_error_that_names_its_holder(tmp_path: pathlib.Path) -> None:
    lines: list[str] = []
    with (
        buildcache.locked(tmp_path / "lock", print),
        pytest.raises(BuildError, match=rf"still locked by another build \(process {os.getpid()}\)"),
        buildcache.locked(tmp_path / "lock", lines.append, deadline_seconds=0.05),
    ):
        pytest.fail("two holders of one lock")
    assert lines == [f"another process is building (process {os.getpid()}); waiting for it"]


def test_a_lock_outlives_no_process(tmp_path: pathlib.Path) -> None:
    hold = "import os, pathlib, sys; from tests.cluster.buildcache import locked\n"
    hold += "with locked(pathlib.Path(sys.argv[1]), print): os._exit(0)"
    subprocess.run([sys.executable, "-c", hold, tmp_path / "lock"], cwd=buildcache.REPOSITORY, timeout=60, check=True)
    lines: list[str] = []
    with buildcache.locked(tmp_path / "lock", lines.append):
        assert lines == []


def test_a_command_past_its_deadline_is_ended_and_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buildcache, "HEARTBEAT_SECONDS", 0.05)
    lines: list[str] = []
    child = tmp_path / "child"
    script = f"echo so far so good; sleep 600 & echo $! > {child}; wait"
    with pytest.raises(BuildError, match=r"(?s)thing failed .*ended at its deadline of 0 s.*try later.*so far so good"):
        buildcache.run(
            ["sh", "-c", script], what="thing", progress=lines.append, remedy="try later", deadline_seconds=0.4
        )
    assert any("still at work" in line for line in lines)
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{child.read_text().strip()}/exe").exists():
        assert time.monotonic() < deadline, "the command's own child outlived it"
        time.sleep(0.01)


def flaky(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, *says: str) -> pathlib.Path:
    """A `go` whose builds fail with these words one by one, and work afterwards; returns the list of its runs."""
    real, runs = shutil.which("go"), tmp_path / "runs"
    for number, words in enumerate(says, 1):
        (tmp_path / f"says-{number}").write_text(f"{words}\n")
    go = tmp_path / "path" / "go"
    go.parent.mkdir()
    go.write_text(
        f'#!/bin/sh\n[ "$1" = build ] || exec {real} "$@"\necho "$1" >> {runs}\n'
        f'said={tmp_path}/says-$(wc -l < {runs})\n[ ! -e "$said" ] || {{ cat "$said"; exit 1; }}\nexec {real} "$@"\n'
    )
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{go.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(buildcache, "PAUSE_SECONDS", 0.0)
    return runs


@needs_go
def test_a_module_that_could_not_be_fetched_is_fetched_again(
    modules: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = "main.go:3:8: reading https://proxy.example.test/x/@v/v1.0.0.zip:"
    runs = flaky(tmp_path, monkeypatch, f"{where} 502 Bad Gateway", f"{where} unexpected EOF")
    lines: list[str] = []
    folder = binaries.ensure(lines.append, only={"one"})
    assert says(folder / "one") == "first"
    assert len(runs.read_text().split()) == 3
    again = [line for line in lines if "trying again" in line]
    assert ["502 Bad Gateway" in line for line in again] == [True, False]
    assert again[0].endswith("trying again, attempt 2 of 3")


@needs_go
@pytest.mark.parametrize(
    ("words", "builds"),
    [
        ("dial tcp 192.0.2.1:443: i/o timeout", 3),
        ("read: connection reset by peer", 3),
        ("net/http: TLS handshake timeout", 3),
        ("main.go:3:15: undefined: function", 1),
        ("main.go:4:1: syntax error: unexpected EOF, expecting }", 1),
    ],
)
def test_only_trouble_with_the_network_is_tried_again_and_not_for_ever(
    modules: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, words: str, builds: int
) -> None:
    runs = flaky(tmp_path, monkeypatch, *[words] * 4)
    with pytest.raises(BuildError, match=re.escape(words)):
        binaries.ensure(print, only={"one"})
    assert len(runs.read_text().split()) == builds
