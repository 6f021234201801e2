"""Smaller parts of the supervisor: configuration, state file, orphans, tokens."""

import re
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mlx_operator_api import names
from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.status import LastFailure
from mlx_operator_api.tasks import Predecessor, RunnerReport
from mlx_runner import channel
from mlx_runner.supervisor import config, engine_process
from mlx_runner.supervisor.cgroup import Cgroup
from mlx_runner.supervisor.state_file import StateFile
from mlx_runner.supervisor.tokens import Strangers, authorized

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


# -- configuration
@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "token").write_text("secret\n")
    return {
        names.ENV_UID: "uid-1",
        names.ENV_RANK: "2",
        names.ENV_TOKEN_FILE: str(tmp_path / "token"),
        names.ENV_STATE_DIR: str(tmp_path),
    }


def test_the_environment_becomes_a_configuration(environment: dict[str, str]) -> None:
    settings = config.from_environment({**environment, names.ENV_GRACE: "45", config.ENV_ENGINE: "python 'a b.py'"})
    assert (settings.uid, settings.rank, settings.token, settings.grace_seconds) == ("uid-1", 2, "secret", 45.0)
    assert settings.engine_argv == ("python", "a b.py")
    assert settings.model_dir == Path(names.MODEL_MOUNT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({names.ENV_UID: ""}, "MLX_INSTANCE_UID is not set"),
        ({names.ENV_RANK: "two"}, "MLX_RUNNER_RANK='two' is no rank: it must be a number from 0 to 63"),
        ({names.ENV_RANK: "64"}, "it must be a number from 0 to 63"),
        ({names.ENV_TOKEN_FILE: "/nowhere"}, "cannot read the token file /nowhere"),
        ({names.ENV_STATE_DIR: "/nowhere"}, "MLX_RUNNER_STATE_DIR='/nowhere' is no writable directory"),
        ({names.ENV_GRACE: "soon"}, "MLX_RUNNER_GRACE_SECONDS='soon' is no duration"),
        ({names.ENV_GRACE: "nan"}, "MLX_RUNNER_GRACE_SECONDS='nan' is no duration"),
    ],
)
def test_a_bad_variable_is_one_sentence_that_names_it(
    environment: dict[str, str], changes: dict[str, str], message: str
) -> None:
    with pytest.raises(config.ConfigError, match=r"^[^\n]*$") as caught:
        config.from_environment({**environment, **changes})
    assert message in str(caught.value)


def test_the_name_of_each_environment_variable_stands_in_one_place() -> None:
    root = Path(__file__).resolve().parents[2]
    found: dict[str, list[str]] = {}
    for part in ("api", "operator", "runner_image"):
        for file in (root / part).rglob("*.py"):
            for name in re.findall(r'"(MLX_(?:RUNNER|INSTANCE)_[A-Z_]*[A-Z])"', file.read_text(encoding="utf-8")):
                found.setdefault(name, []).append(str(file.relative_to(root)))
    assert found["MLX_RUNNER_GRACE_SECONDS"] == ["api/mlx_operator_api/names.py"]
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_a_supervisor_without_its_environment_says_so_and_exits_2() -> None:
    root = Path(__file__).resolve().parents[2]
    path = f"{root / 'api'}:{root / 'runner_image'}"
    done = subprocess.run(
        [sys.executable, "-m", "mlx_runner"], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        "mlx-runner: cannot read the token file /var/run/secrets/mlx-operator.dev/token "
    ) or done.stderr.startswith("mlx-runner: the environment variable MLX_INSTANCE_UID is not set")
    assert done.stderr.count("\n") == 1


def test_the_engine_gets_blas_threads_of_the_quota_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("300000 100000")
    blas = tmp_path / "openblas.so.0"
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("LD_PRELOAD", "/other.so")
    settings = config.Config(uid="u", rank=0, token="t", blas=blas)
    cgroup = Cgroup(tmp_path, tmp_path / "membership")
    env = engine_process.engine_environment(settings, cgroup, tmp_path / "page", 7)
    assert (env["OPENBLAS_NUM_THREADS"], env["LD_PRELOAD"]) == ("3", "/other.so"), "the library is not there"
    assert (env[channel.FD_VARIABLE], env[channel.PROGRESS_VARIABLE]) == ("7", str(tmp_path / "page"))
    blas.touch()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    env = engine_process.engine_environment(settings, cgroup, tmp_path / "page", 7)
    assert (env["OPENBLAS_NUM_THREADS"], env["LD_PRELOAD"]) == ("1", f"{blas}:/other.so")


def test_only_the_token_is_authorized() -> None:
    assert authorized("Bearer secret", "secret")
    assert authorized("bearer  secret ", "secret")
    for header in (None, "", "secret", "Bearer", "Bearer secre", "Basic secret", "Bearer secret2", "Bearer sécret"):
        assert not authorized(header, "secret")


def test_wrong_tokens_are_told_once_a_minute_with_the_address(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    strangers = Strangers(lambda: now)
    for seconds, peer in [(0.0, "10.0.0.1"), (1.0, "10.0.0.2"), (59.9, "10.0.0.3"), (60.0, "10.0.0.4"), (61.0, None)]:
        now = seconds
        strangers.refused(peer)
    told = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert told == [
        "requests without the right bearer token: 1, the last from 10.0.0.1",
        "requests without the right bearer token: 3, the last from 10.0.0.4",
    ]


# -- the state file
def report(epoch: int, state: RunnerState, **fields: object) -> RunnerReport:
    base = RunnerReport(
        instance_uid="u", rank=0, incarnation="first", seq=4, epoch=epoch, world_size=2, state=state, since=NOW
    )
    return base.model_copy(update=fields)


FAILURE = LastFailure(epoch=2, time=NOW, state=RunnerState.LOADING, reason=Reason.OUT_OF_MEMORY, message="killed")
EARLIER = Predecessor(incarnation="zeroth", epoch=1, state=RunnerState.READY, last_report=NOW)


@pytest.mark.parametrize("state", [s for s in RunnerState if s is not RunnerState.SHUTDOWN])
def test_a_runner_that_was_not_shut_down_is_inherited(tmp_path: Path, state: RunnerState) -> None:
    failure = FAILURE if state is RunnerState.FAILED else None
    StateFile(tmp_path).write(report(2, state, failure=failure))
    found = StateFile(tmp_path).predecessor("u", 0)
    assert found is not None
    assert (found.incarnation, found.epoch, found.state, found.failure) == ("first", 2, state, failure)


def test_what_is_no_runner_of_ours_is_not_inherited(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    assert file.predecessor("u", 0) is None
    file.write(report(2, RunnerState.SHUTDOWN))
    assert file.predecessor("u", 0) is None
    file.write(report(2, RunnerState.READY))
    assert file.predecessor("other", 0) is None
    assert file.predecessor("u", 1) is None
    for damaged in (b'{"half": ', b"\xff\xfe{", b""):
        (tmp_path / "report.json").write_bytes(damaged)
        assert file.predecessor("u", 0) is None


def test_a_supervisor_without_an_epoch_hands_its_own_inheritance_on(tmp_path: Path) -> None:
    file = StateFile(tmp_path)
    file.write(report(0, RunnerState.PENDING, predecessor=EARLIER))
    assert file.predecessor("u", 0) == EARLIER


def test_a_volume_that_cannot_be_written_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = StateFile(tmp_path / "gone")
    for _ in range(3):
        file.write(report(1, RunnerState.IDLE))
    assert len(caplog.messages) == 1


# -- children
def test_orphans_are_reaped_and_owned_children_are_left_to_their_owner() -> None:
    program = textwrap.dedent("""
        import asyncio, ctypes, os, subprocess
        from mlx_runner.supervisor import children
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us, as to PID 1

        async def main():
            children.watch_orphans(asyncio.get_running_loop())
            parent = children.spawn(["sh", "-c", "sleep 0.1 & sleep 0.2 & exit 7"], environment=os.environ,
                                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            print(await parent.wait())
            async with asyncio.timeout(30):
                while open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read():
                    await asyncio.sleep(0.02)
            print("none left")

        asyncio.run(main())
    """)
    root = Path(__file__).resolve().parents[2]
    env = {"PYTHONPATH": f"{root / 'api'}:{root / 'runner_image'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("7\nnone left\n", "")
