"""One engine process and the pair of pipes to it: garbage, a closed channel, a bug of ours."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mlx_runner import channel
from mlx_runner.supervisor import engine_process
from mlx_runner.supervisor.cgroup import Cgroup
from mlx_runner.supervisor.config import Config
from mlx_runner.supervisor.engine_process import EngineProcess
from mlx_runner.supervisor.engines import Engines, spare_bytes
from mlx_runner.supervisor.watch import read_process

PATIENCE = 60.0
PREAMBLE = "import os, socket, time; s = socket.socket(fileno=int(os.environ['MLX_RUNNER_CHANNEL_FD']));"
STARTED = 's.sendall(b\'{"kind": "Started", "pid": 1, "device": "cpu", "blas": "x"}\\n\');'


def config(tmp_path: Path, program: str) -> Config:
    return Config(uid="u", rank=0, token="t", state_dir=tmp_path, engine_argv=(sys.executable, "-c", program))


_others: set[int] = set()


def _all_children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def others() -> None:
    """What lives already, such as the groups of engines that other tests share."""
    _others.clear()
    _others.update(_all_children())


def children() -> set[int]:
    """Processes that a test has started."""
    return _all_children() - _others


async def start(tmp_path: Path, program: str) -> EngineProcess:
    return await engine_process.spawn(config(tmp_path, PREAMBLE + program), Cgroup())


async def test_garbage_is_skipped_and_what_follows_is_heard(tmp_path: Path) -> None:
    engine = await start(tmp_path, f"s.sendall(b'garbage\\n{{\\n'); {STARTED} os._exit(5)")
    events: list[channel.Event] = []
    engine.on_event = events.append
    exit_ = await asyncio.wait_for(engine.wait(), PATIENCE)
    assert [event.kind for event in events] == ["Started"]
    assert (exit_.code, engine.alive, engine.started) == (5, False, True)


async def test_an_engine_that_closes_its_channel_is_killed_and_that_is_told(tmp_path: Path) -> None:
    engine = await start(tmp_path, "s.close(); time.sleep(3600)")
    exit_ = await asyncio.wait_for(engine.wait(), PATIENCE)
    assert exit_.what() == "engine killed by its supervisor because it closed its channel"


async def test_a_bug_in_what_an_event_sets_off_ends_the_engine_instead_of_leaving_it_unheard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start(tmp_path, f"{STARTED} time.sleep(3600)")

    def broken(event: channel.Event) -> None:
        raise RuntimeError("a bug")

    engine.on_event = broken
    exit_ = await asyncio.wait_for(engine.wait(), PATIENCE)
    assert exit_.what() == "engine killed by its supervisor because its supervisor could not handle what it said"
    assert "a bug in the supervisor: a bug" in caplog.messages


async def test_what_the_engine_started_dies_with_it_and_holds_nothing_up(tmp_path: Path) -> None:
    said = tmp_path / "pid"
    program = (
        "import pathlib, subprocess; child = subprocess.Popen(['sleep', '3600']);"
        f"pathlib.Path('{said}').write_text(str(child.pid)); os._exit(3)"
    )
    engine = await start(tmp_path, program)
    exit_ = await asyncio.wait_for(engine.wait(), PATIENCE)
    assert exit_.code == 3
    async with asyncio.timeout(PATIENCE):
        # Nobody reaps it here as PID 1 does in a pod: it may stay a zombie.
        while (process := read_process(int(said.read_text()))) is not None and process.state != "Z":  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_commands_to_an_engine_that_is_gone_are_dropped(tmp_path: Path) -> None:
    engine = await start(tmp_path, "os._exit(0)")
    await asyncio.wait_for(engine.wait(), PATIENCE)
    engine.send(channel.Warmup())
    engine.kill()
    assert engine.progress.steps == 0


async def test_the_last_words_of_an_engine_are_heard_although_a_command_to_it_fails(tmp_path: Path) -> None:
    engine = await start(tmp_path, f"{STARTED} os._exit(70)")
    # The loop stands still meanwhile: the engine is gone and nothing of it was read.
    os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
    events: list[channel.Event] = []
    engine.on_event = events.append
    engine.send(channel.Warmup())
    exit_ = await asyncio.wait_for(engine.wait(), PATIENCE)
    assert exit_.code == 70
    assert [event.kind for event in events] == ["Started"]


async def test_an_engine_killed_with_a_command_unread_is_no_error_of_its_supervisor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start(tmp_path, f"{STARTED} time.sleep(3600)")
    await until(lambda: engine.started)
    engine.send(channel.Warmup())
    engine.kill()
    await asyncio.wait_for(engine.wait(), PATIENCE)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_there_is_never_more_than_one_engine(tmp_path: Path) -> None:
    engines = Engines(config(tmp_path, f"{PREAMBLE}{STARTED} time.sleep(3600)"), Cgroup())
    engines.prepare()
    seen: set[int] = set()
    for _ in range(4):
        engine = await engines.take()
        engines.prepare()
        await asyncio.sleep(0)
        assert engine.pid in children()
        assert not seen & children()
        seen.add(engine.pid)
    await engines.close()
    assert not engine.alive
    with pytest.raises(OSError, match="ending"):
        await engines.take()


async def test_a_program_that_is_not_there_is_an_error_of_the_start(tmp_path: Path) -> None:
    settings = Config(uid="u", rank=0, token="t", state_dir=tmp_path, engine_argv=("/nowhere/engine",))
    with pytest.raises(FileNotFoundError):
        await engine_process.spawn(settings, Cgroup())


@pytest.fixture
async def engines(tmp_path: Path) -> AsyncIterator[Engines]:
    """Engines that only say that they have started, in a cgroup of files."""
    place = tmp_path / "cgroup"
    place.mkdir()
    made = Engines(config(tmp_path, f"{PREAMBLE}{STARTED} time.sleep(3600)"), Cgroup(place, place / "membership"))
    yield made
    await made.close()


async def test_a_spare_stands_by_once_the_engine_in_use_serves_and_is_the_next_one(engines: Engines) -> None:
    first = await engines.take()
    engines.prepare()
    await asyncio.sleep(0)
    assert children() == {first.pid}, "none before it serves"
    engines.stand_by()
    await until(lambda: len(children()) == 2)
    (spare,) = children() - {first.pid}
    await until(lambda: oom_score(spare) == 1000)
    second = await engines.take()
    assert second.pid == spare
    assert children() == {spare}, "the engine that was in use is gone"
    assert oom_score(spare) == oom_score(os.getpid())
    engines.stand_by()
    await until(lambda: len(children()) == 2)
    await engines.close()
    assert not children()


async def test_a_spare_that_dies_is_replaced_and_harms_nobody(engines: Engines) -> None:
    first = await engines.take()
    engines.stand_by()
    await until(lambda: len(children()) == 2)
    (spare,) = children() - {first.pid}
    os.kill(spare, signal.SIGKILL)
    await until(lambda: len(children()) == 2 and spare not in children())
    assert first.alive


@pytest.mark.parametrize(("limit", "spares"), [(3, 0), (5, 1)])
async def test_under_a_small_memory_limit_there_is_no_spare(
    engines: Engines, tmp_path: Path, limit: int, spares: int
) -> None:
    place = tmp_path / "cgroup"
    first = await engines.take()
    await until(lambda: first.bare_bytes > 0)
    (place / "memory.max").write_text(str(limit * first.bare_bytes))
    first.reserved_bytes = spare_bytes(limit * first.bare_bytes, first.bare_bytes)
    assert first.reserved_bytes == spares * first.bare_bytes
    engines.stand_by()
    if spares:
        await until(lambda: len(children()) == 2)
    else:
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "next-engine"]


async def test_the_kill_of_a_spare_for_memory_is_not_told_of_the_engine_in_use(
    engines: Engines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "cgroup"
    events = place / "memory.events"
    events.write_text("oom_kill 0\n")
    first = await engines.take()
    engines.stand_by()
    await until(lambda: len(children()) == 2)
    (spare,) = children() - {first.pid}
    events.write_text("oom_kill 1\n")
    os.kill(spare, signal.SIGKILL)
    await until(lambda: "the kernel killed the spare engine for memory" in caplog.text)
    assert children() == {first.pid}
    engines.stand_by()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "next-engine"], "the next would die as well"
    os.kill(first.pid, signal.SIGKILL)
    exit_ = await asyncio.wait_for(first.wait(), PATIENCE)
    assert (exit_.signal, exit_.oom_kills) == ("SIGKILL", 0)


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (the kernel's table of processes tells no news)
            await asyncio.sleep(0.02)
