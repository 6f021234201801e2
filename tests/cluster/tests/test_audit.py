"""The place in an audit log from which to read on."""

from pathlib import Path

import pytest

from tests.cluster.audit import AuditLog


@pytest.mark.parametrize("length", [1, 1000, 1 << 16, 200_000])
def test_a_mark_is_behind_the_last_whole_line_however_long_lines_are(tmp_path: Path, length: int) -> None:
    path = tmp_path / "audit.log"
    log = AuditLog(path)
    assert log.mark() == 0
    whole = b"x" * length + b"\n" + b"y" * length + b"\n"
    path.write_bytes(whole)
    assert log.mark() == len(whole)
    path.write_bytes(whole + b"z" * length)
    assert log.mark() == len(whole)
    path.write_bytes(b"z" * length)
    assert log.mark() == 0
