"""What the conditions say: one function each, from the same situation."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.runner import ORDER, RunnerState
from mlx_operator_api.sizes import human_size
from mlx_operator_api.status import MAX_MESSAGE, GroupFailure, LastFailure, RunnerStatus, Status

from . import downloads, remedies, restart
from .conditions import Fact
from .failure import pending
from .messages import clauses, count, listed, one_line
from .picture import Picture, assigned, effective, who
from .podstart import up
from .problem import Problem

_C = ConditionType


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything a condition follows from."""

    picture: Picture
    status: Status
    """As this plan will write it, conditions aside."""
    problem: Problem | None
    halted: bool = False
    """The spec is refused: nothing starts again before it is corrected."""
    leftover: Problem | None = None
    """A pod that no rank needs does not go."""

    @property
    def failure(self) -> GroupFailure | LastFailure | None:
        """The failure of this epoch or the one before it that nothing newer has replaced."""
        return restart.open_failure(self.status) or pending(self.status)

    @property
    def blocked(self) -> Problem | None:
        """The problem, unless a failure is the news: one that has to be solved, or that holds up a restart now due."""
        due = self.status.next_restart_at
        waits = due is not None and not self.picture.clock.passed(due)
        searching = restart.open_failure(self.status) is None
        if self.problem is None or self.problem.stalled or self.failure is None:
            return self.problem
        return None if waits or searching else self.problem

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.picture.wanted.world_size

    def reached(self, state: RunnerState) -> int:
        """How many ranks of this epoch got to a state and have not ended."""
        if self.failure is not None:
            return 0
        low, high = ORDER[state], ORDER[RunnerState.RUNNING]
        states = (effective(rank, self.status.epoch) for rank in self.picture.ranks)
        return sum(low <= ORDER[found] <= high for found in states)

    def everywhere(self, state: RunnerState) -> bool:
        """Whether all ranks got there."""
        return self.reached(state) == self.size


def all_of(situation: Situation) -> Mapping[ConditionType, Fact]:
    """Every condition."""
    ready = _ready(situation)
    stalled = _stalled(situation, ready)
    return {
        _C.READY: ready,
        _C.RECONCILING: _reconciling(situation, ready, stalled),
        _C.STALLED: stalled,
        _C.SCHEDULED: _scheduled(situation),
        _C.MODEL_AVAILABLE: _model_available(situation),
        _C.CONNECTED: _connected(situation),
        _C.LOADED: _loaded(situation),
        _C.RUNNER_FAILED: _runner_failed(situation, ready),
    }


def failure_message(situation: Situation) -> str:
    """The last failure by the grammar: who, what, evidence, next step."""
    status, rules = situation.status, situation.picture.wanted.restarts
    waiting = pending(status)
    if restart.open_failure(status) is None and waiting is not None:
        advice = remedies.find(waiting.reason, waiting.message, None)
        return clauses(waiting.message, "the cause is being looked for", advice)
    if not status.history:
        return "no failure was recorded"
    last, final = status.history[0], restart.final_failure(status)
    spent = final is not None and final.reason.retry is not Retry.NEVER
    hint = Reason.RESTART_BUDGET_EXHAUSTED.remedy if spent else ""
    pod = status.runner(last.rank).pod if last.rank is not None else None
    step = "no restart before the spec is corrected" if situation.halted else restart.next_step(status, rules)
    rest = clauses(step, remedies.find(last.reason, last.message, pod), hint)
    # The next step is never what is cut off.
    return clauses(one_line(last.message, MAX_MESSAGE - len(rest) - 2), rest)


def _ready(s: Situation) -> Fact:
    final, problem = restart.final_failure(s.status), s.blocked
    if final is not None:
        spent = final.reason.retry is not Retry.NEVER
        reason = Reason.RESTART_BUDGET_EXHAUSTED if spent else final.reason
        return Fact("False", reason, failure_message(s))
    if problem is not None:
        return Fact("False", problem.reason, problem.message)
    if s.failure is not None:
        return Fact("False", s.failure.reason, failure_message(s))
    reason, message = _phase(s)
    return Fact("True" if reason is Reason.READY else "False", reason, message)


def _phase(s: Situation) -> tuple[Reason, str]:
    """How far the epoch is."""
    running = sum(up(rank) for rank in s.picture.ranks)
    if running < s.size and not assigned(s.status):
        return Reason.WAITING_FOR_PODS, f"{running}/{s.size} pods run; {_waiting_pods(s)}"
    if not assigned(s.status):
        return Reason.WAITING_FOR_RUNNERS, f"{s.size}/{s.size} pods run; epoch {s.status.epoch} starts when all answer"
    if not s.everywhere(RunnerState.IDLE):
        done = s.reached(RunnerState.IDLE)
        return Reason.EPOCH_STARTED, f"epoch {s.status.epoch} starts: {done}/{s.size} runners created"
    if (have := _available(s)) < s.size:
        return Reason.DOWNLOADING, f"{have}/{s.size} runners have the model's files; {_behind(s, RunnerState.IDLE)}"
    if s.size > 1 and not s.everywhere(RunnerState.CONNECTED):
        done = s.reached(RunnerState.CONNECTED)
        return Reason.CONNECTING, f"{done}/{s.size} runners connected; {_behind(s, RunnerState.CONNECTING)}"
    if not s.everywhere(RunnerState.LOADED):
        done = s.reached(RunnerState.LOADED)
        return Reason.LOADING, f"{done}/{s.size} runners hold their shard; {_behind(s, RunnerState.LOADING)}"
    if not s.everywhere(RunnerState.READY):
        done = s.reached(RunnerState.READY)
        return Reason.WARMING_UP, f"{done}/{s.size} runners warmed up; {_behind(s, RunnerState.WARMING_UP)}"
    pod = s.picture.ranks[0].pod
    if pod is None or not pod.ready:
        return Reason.WAITING_FOR_ENDPOINT, f"all runners are ready; waiting for pod {_name(s, 0)} to be Ready"
    served, endpoint = s.picture.wanted.runner.served_name, s.status.endpoint
    return Reason.READY, f"{s.size}/{s.size} runners serve {served} at {endpoint}"


def _name(s: Situation, rank: int) -> str:
    return s.status.runner(rank).pod or f"of rank {rank}"


def _waiting_pods(s: Situation) -> str:
    """The first rank whose pod does not run, and what it is at."""
    rank = next(rank for rank in s.picture.ranks if not up(rank))
    name = who(rank.rank, s.size, _name(s, rank.rank), rank.pod.node if rank.pod else None)
    pod = rank.pod
    if pod is None:
        former = " after the former one of its name is gone" if rank.foreign is not None else ""
        return f"{name} is being created{former}"
    if pod.deleting:
        return f"{name} is being deleted, another one follows"
    if not pod.scheduled:
        return f"{name} waits for a node"
    return f"{name} is being started"


def _behind(s: Situation, state: RunnerState) -> str:
    """The ranks that have not got beyond a state."""
    late = [r for r in s.status.runners if ORDER[r.state] <= ORDER[state]]
    if not late:
        return "reports are due"
    first = late[0]
    progress = f" ({first.progress})" if first.progress else ""
    more = f" and {count(len(late) - 1, 'other')}" if len(late) > 1 else ""
    return f"waiting for rank {first.rank} on node {first.node or '?'}{progress}{more}"


def _available(s: Situation) -> int:
    """In the epoch that runs, or that failed: files stay when engines end."""
    epoch = s.status.epoch if s.failure is None else s.failure.epoch
    return sum(downloads.available(rank, epoch, s.picture.stored) for rank in s.picture.ranks)


def _stalled(s: Situation, ready: Fact) -> Fact:
    if restart.final_failure(s.status) is not None or (s.problem is not None and s.problem.stalled):
        return Fact("True", ready.reason, ready.message)
    if ready.status == "True":
        return Fact("False", Reason.RECONCILED, "nothing is in the way")
    return Fact("False", Reason.PROGRESSING, "work goes on by itself")


def _reconciling(s: Situation, ready: Fact, stalled: Fact) -> Fact:
    if stalled.status == "True":
        return Fact("False", stalled.reason, "nothing goes on until somebody acts: see Stalled")
    if ready.status == "True" and s.leftover is not None:
        return Fact("True", s.leftover.reason, s.leftover.message)
    if ready.status == "True":
        return Fact("False", Reason.RECONCILED, "there is nothing to do")
    if s.failure is not None and s.blocked is None:
        pending_only = restart.open_failure(s.status) is None
        step = restart.next_step(s.status, s.picture.wanted.restarts)
        return Fact("True", Reason.RESTART_BACKOFF, "a failure is being looked into" if pending_only else step)
    if s.problem is not None:
        return Fact("True", Reason.PROGRESSING, "waiting for what is in the way: see Ready")
    return Fact("True", Reason.PROGRESSING, ready.message)


def _scheduled(s: Situation) -> Fact:
    if s.problem is not None and s.problem.where is _C.SCHEDULED:
        return Fact("False", s.problem.reason, s.problem.message)
    if all(up(rank) for rank in s.picture.ranks):
        places = listed(*(_place(record) for record in s.status.runners[:16]))
        more = ", …" if s.size > 16 else ""
        return Fact("True", Reason.PODS_RUNNING, f"{s.size}/{s.size} pods run: {places}{more}")
    running = sum(up(rank) for rank in s.picture.ranks)
    return Fact("False", Reason.WAITING_FOR_PODS, f"{running}/{s.size} pods run; {_waiting_pods(s)}")


def _place(record: RunnerStatus) -> str:
    return f"{record.pod} on {record.node}" if record.node else str(record.pod)


def _model_available(s: Situation) -> Fact:
    if s.problem is not None and s.problem.where is _C.MODEL_AVAILABLE:
        return Fact("False", s.problem.reason, s.problem.message)
    if not assigned(s.status) and s.failure is None:
        return _kept(s, _C.MODEL_AVAILABLE, "not known before the runners start")
    have, model = _available(s), s.status.model
    if have < s.size and s.failure is not None:
        return _kept(s, _C.MODEL_AVAILABLE, "not known before the runners start")
    if have < s.size:
        return Fact("False", Reason.DOWNLOADING, f"{have}/{s.size} runners have every file they need, verified")
    size = f"{human_size(model.bytes)}, " if model is not None and model.bytes else ""
    digest = f"digest {model.digest[:19]}, " if model is not None and model.digest else ""
    return Fact("True", Reason.MODEL_VERIFIED, f"{size}{digest}{have}/{s.size} runners have every file they need")


def _kept(s: Situation, kind: ConditionType, unknown: str) -> Fact:
    """What was known before; only a new source makes it unknown."""
    old = s.picture.stored.condition(kind)
    model, before = s.status.model, s.picture.stored.model
    if old is None or (before is not None and model is not None and before.sources != model.sources):
        return Fact("Unknown", Reason.UNKNOWN, unknown)
    return Fact(old.status, old.reason, old.message)


def _connected(s: Situation) -> Fact:
    if s.size == 1:
        return Fact("True", Reason.SINGLE_RUNNER, "one runner: there is no group to form")
    if s.failure is not None:
        return _ended(s, s.failure)
    if s.everywhere(RunnerState.CONNECTED):
        return Fact("True", Reason.GROUP_CONNECTED, f"group of epoch {s.status.epoch} connected: {s.size} runners")
    if not assigned(s.status):
        return Fact("False", Reason.WAITING_FOR_RUNNERS, f"epoch {s.status.epoch} has not started")
    done = s.reached(RunnerState.CONNECTED)
    return Fact("False", Reason.CONNECTING, f"{done}/{s.size} runners connected in epoch {s.status.epoch}")


def _loaded(s: Situation) -> Fact:
    if s.failure is not None:
        return _ended(s, s.failure)
    if s.everywhere(RunnerState.LOADED):
        return Fact("True", Reason.MODEL_LOADED, shards(s.status))
    if not assigned(s.status):
        return Fact("False", Reason.WAITING_FOR_RUNNERS, f"epoch {s.status.epoch} has not started")
    done = s.reached(RunnerState.LOADED)
    return Fact("False", Reason.LOADING, f"{done}/{s.size} runners hold their shard")


def shards(status: Status) -> str:
    """Which layers each rank holds, and what was noted of them."""
    layers = listed(*(f"rank {r.rank}: {r.layers}" for r in status.runners[:16] if r.layers))
    held = f"; layers of {layers}" if layers else ""
    notes = dict.fromkeys(part for r in status.runners if r.note for part in r.note.split("; "))
    said = "".join(f"; {note}" for note in notes)
    size = len(status.runners)
    return f"{size}/{size} runners hold their shard{held}{said}"


def _ended(s: Situation, failure: GroupFailure | LastFailure) -> Fact:
    return Fact("False", failure.reason, f"the group of epoch {failure.epoch} failed: see RunnerFailed")


def _runner_failed(s: Situation, ready: Fact) -> Fact:
    old = s.picture.stored.condition(_C.RUNNER_FAILED)
    failing = s.failure is not None
    if failing or (old is not None and old.status == "True" and ready.status != "True"):
        failure = s.failure or (s.status.history[0] if s.status.history else None)
        reason = failure.reason if failure is not None else Reason.RUNNER_FAILED
        return Fact("True", reason, failure_message(s))
    if not s.status.history:
        return Fact("False", Reason.NO_FAILURE, "no failure was recorded")
    last = s.status.history[0]
    return Fact("False", Reason.RECOVERED, f"last failure, in epoch {last.epoch}: {last.message}")
