"""The set-up of a machine tries again what it downloads."""

from collections.abc import Callable

import pytest

from tests import setup


def failing(times: int, did: list[str], name: str) -> Callable[[], None]:
    """A step that fails a few times and works afterwards."""

    def step() -> None:
        did.append(name)
        if did.count(name) <= times:
            raise setup.SetupError(f"{name} failed (exit 100)")

    return step


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "PAUSE_SECONDS", 0.0)


def test_an_install_that_fails_is_tried_again_from_the_update_on(capsys: pytest.CaptureFixture[str]) -> None:
    did: list[str] = []
    setup.persistently(failing(0, did, "update"), failing(2, did, "install"))
    assert did == ["update", "install"] * 3
    said = capsys.readouterr().out
    assert "install failed (exit 100)" in said
    assert "attempt 2 of 3" in said and "attempt 3 of 3" in said


def test_the_third_failure_is_the_last() -> None:
    did: list[str] = []
    with pytest.raises(setup.SetupError, match=r"update failed \(exit 100\)"):
        setup.persistently(failing(9, did, "update"), failing(0, did, "install"))
    assert did == ["update"] * 3
