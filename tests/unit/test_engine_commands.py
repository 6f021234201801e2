"""Commands that an engine cannot read: whoever asked is told, and nothing waits for ever."""

import socket
import threading
from pathlib import Path

import pytest

from mlx_runner import channel
from mlx_runner.engine import main
from mlx_runner.progress import Progress

ASKED = [
    channel.Generate(id='a "quoted" id', prompt="x"),
    channel.Tokenize(id="tokenize-1", prompt="x"),
    channel.Detokenize(id="detokenize-1", tokens=(1,)),
]


@pytest.mark.parametrize("command", ASKED, ids=lambda command: command.kind)
def test_who_asks_is_known_also_of_a_line_that_cannot_be_read(command: channel.Command) -> None:
    line = channel.encode(command)
    assert isinstance(command, channel.Generate | channel.Tokenize | channel.Detokenize)
    assert channel.asker(line) == channel.asker(line[:-9] + b"garbage") == command.id


@pytest.mark.parametrize(
    "line",
    [
        channel.encode(channel.Cancel(id="x")),
        channel.encode(channel.Goodbye()),
        channel.encode(channel.Notice(level="info", text='{"kind":"Generate","id":"x"')),
        b'{"kind":"Generate","id":7}\n',
        b'{"kind":"Generate","id":"\xff"}\n',
        b"\n",
    ],
)
def test_a_line_that_asks_nothing_has_no_asker(line: bytes) -> None:
    assert channel.asker(line) is None


def test_an_engine_refuses_a_request_that_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr("os._exit", lambda code: ended.set())
    ours, theirs = socket.socketpair()
    engine = main.Engine(theirs, Progress(tmp_path / "progress", create=True))
    nested = '{"x":' * 300 + "1" + "}" * 300
    line = channel.encode(channel.Generate(id="deep", prompt="x"))
    with ours, theirs:
        engine.start()
        ours.sendall(line.replace(b'"prompt":"x"', f'"jsonSchema":{nested}'.encode()))
        ours.shutdown(socket.SHUT_WR)
        assert ended.wait(30)
        theirs.shutdown(socket.SHUT_WR)
        events = [channel.decode_event(said) for said in ours.makefile("rb")]
    (refused,) = [event for event in events if isinstance(event, channel.Refused)]
    assert (refused.id, refused.status, refused.code) == ("deep", 500, "internal_error")
    assert any(isinstance(event, channel.Notice) for event in events)
