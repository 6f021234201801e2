"""What is said of a failure: from exit status, stderr, cgroup, process state and step counter."""

import os
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import RunnerState
from mlx_operator_api.tasks import RunnerReport, Sharding
from mlx_runner.progress import Phase, Snapshot
from mlx_runner.quantity import quantity
from mlx_runner.supervisor import evidence
from mlx_runner.supervisor.cgroup import Cgroup
from mlx_runner.supervisor.diagnosis import of_deadline, of_exit
from mlx_runner.supervisor.watch import Process, Sample, Stall, Watch, read_process

S = RunnerState


def report(state: RunnerState = S.RUNNING, **fields: object) -> RunnerReport:
    base = RunnerReport(
        instance_uid="u", rank=1, incarnation="i", seq=1, epoch=3, world_size=2, state=state, since=datetime.now(UTC)
    )
    return base.model_copy(update=fields)


@pytest.mark.parametrize(
    ("code", "oom_kills", "facts", "reason", "message"),
    [
        (-9, 0, {}, Reason.ENGINE_CRASHED, "engine killed by signal 9 (SIGKILL) in RunnerRunning"),
        (-6, 0, {}, Reason.ENGINE_CRASHED, "engine killed by signal 6 (SIGABRT) in RunnerRunning"),
        (
            -9,
            1,
            {"state": S.LOADING, "layers_loaded": 6, "layers_total": 12, "memory_limit_bytes": 512 * 1024**2},
            Reason.OUT_OF_MEMORY,
            "engine killed by signal 9 (SIGKILL) in RunnerLoading at 6/12 layers, memory limit 512Mi, oom_kill 1",
        ),
        (
            -9,
            2,
            {},
            Reason.OUT_OF_MEMORY,
            "engine killed by signal 9 (SIGKILL) in RunnerRunning, no memory limit, oom_kill 2",
        ),
        (3, 1, {}, Reason.ENGINE_CRASHED, "engine exited with code 3 in RunnerRunning"),
        (0, 0, {}, Reason.ENGINE_CRASHED, "engine exited with code 0 in RunnerRunning without having been told to"),
        (
            0,
            0,
            {"state": S.READY, "group": "present"},
            Reason.PEER_LOST,
            "engine exited with code 0 in RunnerReady, as after a goodbye of rank 0",
        ),
    ],
)
def test_an_exit_is_told_with_its_evidence(
    code: int, oom_kills: int, facts: dict[str, object], reason: Reason, message: str
) -> None:
    found = of_exit(evidence.decode(code, oom_kills, ()), report().model_copy(update=facts))
    assert (found.reason, found.message) == (reason, message)
    assert found.peer == (0 if reason is Reason.PEER_LOST else None)


def test_an_engine_that_the_supervisor_gave_up_is_not_told_as_killed_from_outside() -> None:
    found = of_exit(evidence.decode(-9, 0, (), "it closed its channel"), report())
    assert found.message == "engine killed by its supervisor because it closed its channel in RunnerRunning"


@pytest.mark.parametrize(
    ("lines", "meant"),
    [
        (
            [
                "[warn] something failed to matter",
                "Traceback (most recent call last):",
                '  File "x.py", line 1, in <module>',
                "mlx.core.LoadError: tensor 'a' is short",
            ],
            "mlx.core.LoadError: tensor 'a' is short",
        ),
        (["ok", "terminate called after throwing", "  what():  [ring] lost"], "what():  [ring] lost"),
        (["Fatal Python error: Aborted"], "Fatal Python error: Aborted"),
        (["loading", "[ring] Couldn't bind socket (error: 98)"], "[ring] Couldn't bind socket (error: 98)"),
        (["loading 3 of 4", "done"], None),
        ([], None),
    ],
)
def test_the_first_line_that_names_an_error_is_chosen_and_none_is_guessed(lines: list[str], meant: str | None) -> None:
    assert evidence.meaningful(tuple(lines)) == meant


@pytest.mark.parametrize(
    ("reason", "facts", "started", "message"),
    [
        (
            Reason.CONNECT_TIMEOUT,
            {"waiting_for": (0, 2)},
            True,
            "not connected within 40 s: still waiting for rank 0, rank 2",
        ),
        (Reason.CONNECT_TIMEOUT, {}, True, "not connected within 40 s: the engine named no rank that it waits for"),
        (Reason.LOAD_TIMEOUT, {"layers_loaded": 3, "layers_total": 9}, True, "not loaded within 40 s: 3/9 layers"),
        (Reason.WARMUP_TIMEOUT, {}, False, "warm-up not done within 40 s, step 7; the engine had not started yet"),
    ],
)
def test_a_missed_deadline_says_what_was_waited_for(
    reason: Reason, facts: dict[str, object], started: bool, message: str
) -> None:
    found = of_deadline(reason, 40.0, report().model_copy(update=facts), Sharding.PIPELINE, steps=7, started=started)
    assert (found.reason, found.message) == (reason, message)


def test_a_tensor_group_also_says_whether_its_ring_port_listened() -> None:
    found = of_deadline(Reason.CONNECT_TIMEOUT, 1, report(), Sharding.TENSOR, steps=0, started=True)
    assert found.message.endswith("; ring port 8103 was not seen listening")


# -- the watch
def sample(
    at: float,
    *,
    process: str = "S",
    cpu: float = 1.0,
    phase: Phase = Phase.COMPUTING,
    steps: int = 5,
    waiting_for: int = -1,
    changed: float = 0.0,
    state: RunnerState = S.RUNNING,
    work: bool = True,
) -> Sample:
    return Sample(at, Process(process, cpu), Snapshot(steps, 0, phase, waiting_for, changed), state, work)


def verdict(samples: list[Sample], progress: float = 120.0) -> tuple[float, Stall] | None:
    watch = Watch(progress)
    for one in samples:
        if (stall := watch.look(one)) is not None:
            return one.time, stall
    return None


def test_a_stopped_process_is_told_when_it_stays_so() -> None:
    found = verdict([sample(t, process="T" if t > 3 else "S", cpu=min(t, 3), changed=2.5) for t in range(10)])
    message = "engine process stopped (state T for 2 s) in RunnerRunning, step 5, last progress 4 s ago"
    assert found == (6, Stall(message))


def test_one_that_is_stopped_and_continued_over_and_over_works() -> None:
    assert verdict([sample(t, process="T", cpu=t / 20) for t in range(100)]) is None


def test_one_that_waits_for_a_disk_is_not_frozen_but_has_its_deadline() -> None:
    waiting = [
        Sample(t, Process("S", 1.0, disk=True), Snapshot(5, 0, Phase.COMPUTING, -1, 0.0), S.RUNNING, True)
        for t in range(200)
    ]
    found = verdict(waiting)
    assert found is not None
    assert (found[0], found[1].message.startswith("engine made no step for 120 s")) == (120, True)


def test_computing_without_cpu_time_is_told_after_five_seconds() -> None:
    found = verdict([sample(t) for t in range(10)])
    assert found is not None
    assert found[0] == 5
    assert found[1].message == (
        "engine used 0.00 s of CPU in 5 s while computing in RunnerRunning, process state S, step 5, "
        "last progress 5 s ago"
    )


@pytest.mark.parametrize(("cores", "told"), [(0.005, True), (0.05, False)])
def test_waiting_for_pythons_lock_is_no_computing_but_a_twentieth_of_a_core_is(cores: float, told: bool) -> None:
    assert (verdict([sample(t, cpu=t * cores) for t in range(60)]) is not None) is told


@pytest.mark.parametrize(
    "fields",
    [
        {"phase": Phase.WAITING, "waiting_for": 1},
        {"phase": Phase.IDLE, "work": False},
        {"state": S.LOADING},
    ],
)
def test_waiting_idling_and_slow_storage_are_not_frozen(fields: dict[str, object]) -> None:
    assert verdict([sample(t, **fields) for t in range(100)]) is None  # type: ignore[arg-type]


def test_an_idle_engine_is_never_stalled_however_long() -> None:
    idle = [sample(t, phase=Phase.IDLE, work=False, state=S.READY) for t in range(0, 100_000, 100)]
    assert verdict(idle) is None


def test_no_step_within_the_progress_deadline_is_told_although_cpu_is_burnt() -> None:
    found = verdict([sample(t, cpu=float(t)) for t in range(200)])
    assert found is not None
    assert found[0] == 120
    assert found[1].message.startswith("engine made no step for 120 s in RunnerRunning")
    assert verdict([sample(t, cpu=float(t), steps=t // 100) for t in range(400)]) is None


def test_a_rank_that_waits_blames_the_one_it_waits_for_and_later_than_that_one_itself() -> None:
    found = verdict([sample(t, phase=Phase.WAITING, waiting_for=1) for t in range(200)])
    message = "no answer from rank 1 for 125 s in RunnerRunning, step 5, last progress 125 s ago"
    assert found == (125, Stall(message, peer=1))


def test_a_process_is_read_from_proc_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = ["T", "1", "7", "7", "0", "-1", "0", "0", "0", "0", "0", "250", "50", *["0"] * 30]
    (tmp_path / "7/stat").write_text(f"7 (a ) (b) {' '.join(fields)}")
    cpu = 300 / os.sysconf("SC_CLK_TCK")
    assert read_process(7, proc=tmp_path) == Process("T", cpu)
    assert read_process(8, proc=tmp_path) is None
    (tmp_path / "7/task/9").mkdir(parents=True)
    (tmp_path / "7/task/9/stat").write_text(f"9 (a) D {' '.join(fields[1:])}")
    assert read_process(7, threads=True, proc=tmp_path) == Process("T", cpu, disk=True)
    mine = read_process(os.getpid())
    assert mine is not None
    assert mine.state in "RS"


# -- what the kernel's files say
def files(root: Path, **contents: str) -> Cgroup:
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Cgroup(root, root / "membership")


def test_version_2_of_the_cgroup_is_read(tmp_path: Path) -> None:
    cgroup = files(
        tmp_path,
        memory_dot_max="536870912\n",
        memory_dot_events="low 0\noom 3\noom_kill 2\noom_group_kill 0\n",
        cpu_dot_max="250000 100000\n",
    )
    assert (cgroup.memory_limit(), cgroup.oom_kills(), cgroup.cpus()) == (536870912, 2, 2)


def test_version_1_of_the_cgroup_is_read_at_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("9:memory:/pod/c1\n3:cpu,cpuacct:/pod/c1\n")
    cgroup = files(
        tmp_path,
        memory__pod__c1__memory_dot_limit_in_bytes="1048576\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        memory__pod__c1__memory_dot_oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 4\n",
        cpu__pod__c1__cpu_dot_cfs_quota_us="50000\n",
        cpu__pod__c1__cpu_dot_cfs_period_us="100000\n",
    )
    assert (cgroup.memory_limit(), cgroup.oom_kills(), cgroup.cpus()) == (1048576, 4, 1)


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n"])
def test_no_limit_is_no_number(tmp_path: Path, limit: str) -> None:
    cgroup = files(tmp_path, memory_dot_max=limit, cpu_dot_max="max 100000\n")
    assert (cgroup.memory_limit(), cgroup.oom_kills()) == (None, 0)
    assert cgroup.cpus() == len(os.sched_getaffinity(0))


def test_bytes_are_written_as_kubernetes_writes_them() -> None:
    assert [quantity(n) for n in (512, 2048, 512 << 20, int(1.1 * 2**30), 1536 << 20)] == [
        "512",
        "2Ki",
        "512Mi",
        "1.1Gi",
        "1.5Gi",
    ]


def test_exit_codes_are_decoded() -> None:
    exits = [evidence.decode(code, 0, ()) for code in (0, 70, -signal.SIGSEGV, -40)]
    assert [(e.code, e.signal) for e in exits] == [(0, None), (70, None), (None, "SIGSEGV"), (None, "SIG40")]


def test_a_warm_up_that_waited_for_another_rank_names_it() -> None:
    found = of_deadline(Reason.WARMUP_TIMEOUT, 40.0, report(), Sharding.PIPELINE, steps=7, started=True, waiting_for=0)
    assert (found.message, found.peer) == ("warm-up not done within 40 s, step 7, waiting for rank 0", 0)
