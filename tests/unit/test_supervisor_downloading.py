"""The child that downloads never outlives what asked for it."""

import asyncio
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_runner.download import __main__ as child
from mlx_runner.download import result
from mlx_runner.download.request import Request
from mlx_runner.supervisor import children, downloading


async def test_a_download_that_is_cancelled_while_it_starts_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[children.Child] = []
    spawn = children.spawn

    def spy(*arguments: object, **options: object) -> children.Child:
        started.append(spawn(["sleep", "600"], environment={"PATH": "/usr/bin:/bin"}, stdout=2, stderr=2))
        return started[-1]

    monkeypatch.setattr(children, "spawn", spy)
    asked = Request(source="pvc://m", model_dir=tmp_path, cache_dir=tmp_path, memory=tmp_path / "hashes.json")
    task = asyncio.create_task(downloading.download(asked, seconds=60, tell=lambda **facts: None))
    await asyncio.sleep(0)  # its first step: the child is there, its pipe not yet
    assert started and not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not started[0].alive


def test_what_nobody_thought_of_is_told_as_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise LookupError("no \ud800 at http://robot:s3cret@mirror\nand more")

    monkeypatch.setattr(child, "work", fail)
    asked = Request(source="pvc://m", model_dir=tmp_path, cache_dir=tmp_path, memory=tmp_path / "hashes.json")
    assert child.main(asked) == 0
    out, err = capsys.readouterr()
    said = result.decode(out.encode())
    assert isinstance(said, result.Refused)
    assert said.reason is Reason.MODEL_UNREACHABLE
    assert said.message == "a bug in the download: LookupError: no \\ud800 at http://mirror"
    assert "in fail" in err
    assert "s3cret" not in err
