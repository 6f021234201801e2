"""The whole picture of one instance: for each rank its pod, its supervisor's word and what status remembers."""

import operator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from mlx_operator_api import names
from mlx_operator_api.runner import RunnerState, TaskName
from mlx_operator_api.status import RunnerStatus, Status
from mlx_operator_api.tasks import HEARTBEAT_SECONDS, PROTOCOL, RunnerReport, TaskOutcome, TaskPhase

from . import pods
from .observed import Observed, Refusal, RunnerView, Settings
from .pods import PodView
from .spec import Wanted

FRESH_SECONDS = HEARTBEAT_SECONDS + 2.0
"""Age of the newest report or heartbeat of a supervisor that is surely in touch."""
MEETING_SECONDS = 15.0
"""A starting operator dials every supervisor at once: one that it has not heard yet has at least this long."""
GONE_SECONDS = 30.0
"""How long after its time a pod that is being deleted counts as left behind by its node."""


@dataclass(slots=True)
class Clock:
    """The one time of a plan, and the times at which it wants to be made again."""

    now: datetime
    wakes: list[datetime] = field(default_factory=list)

    @property
    def stamp(self) -> datetime:
        """Now as status keeps it: whole seconds, so that reading it back changes nothing."""
        return self.now.replace(microsecond=0)

    def passed(self, time: datetime) -> bool:
        """Whether a time has come; if not, plan again then."""
        if self.now >= time:
            return True
        self.wakes.append(time)
        return False

    @property
    def requeue_at(self) -> datetime | None:
        """The earliest of those times."""
        return min(self.wakes, default=None)


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank with all that is known of it."""

    rank: int
    record: RunnerStatus
    """What status remembers of it."""
    pod: PodView | None
    """The pod of its name, if it is ours."""
    foreign: PodView | None
    """The pod of its name, if it is somebody else's."""
    view: RunnerView
    report: RunnerReport | None
    """The newest report of its pod's supervisor; None: this process has heard none yet."""
    node_lost: bool
    """Its node is NotReady or gone, and its supervisor does not answer either."""
    refusal: Refusal | None
    notes: tuple[str, ...]

    @property
    def alive(self) -> bool:
        """Its supervisor is in touch."""
        return self.view.connected and self.report is not None

    def heard_lately(self, now: datetime) -> bool:
        """No heartbeat is overdue; a broken network shows here before the stream is given up."""
        received = self.view.received
        return self.alive and (received is None or now - received <= timedelta(seconds=FRESH_SECONDS))

    @property
    def reachable(self) -> bool:
        """Tasks can be sent to it, and will be understood."""
        pod = self.pod
        return self.alive and pod is not None and pod.runs and pod.ip is not None and self.understood

    @property
    def understood(self) -> bool:
        """It speaks our protocol or the one before, and its last report could be read."""
        return not self.view.undecodable and (self.report is None or self.report.protocol in (PROTOCOL, PROTOCOL - 1))

    def in_epoch(self, epoch: int) -> RunnerReport | None:
        """Its report, if it is of the process that joined this epoch and of the epoch itself."""
        report, record = self.report, self.record
        if report is None or self.pod is None or report.epoch != epoch or self.pod.uid != record.pod_uid:
            return None
        return report if report.incarnation == record.incarnation else None

    def with_record(self, record: RunnerStatus) -> "Rank":
        """The same rank with another memory. Most steps of a plan change nothing, and copies are dear."""
        return self if record is self.record else replace(self, record=record)

    def outcome(self, task: TaskName) -> TaskOutcome | None:
        """What became of a task of the runner's present epoch; an answer goes before a rejection."""
        report = self.report
        found = [t for t in report.tasks if t.name is task and t.epoch == report.epoch] if report else []
        return min(found, key=lambda t: t.phase is TaskPhase.REJECTED, default=None)


@dataclass(frozen=True, slots=True)
class Picture:
    """All ranks, and what lies beside them."""

    wanted: Wanted
    stored: Status
    """Status as the API server has it."""
    ranks: tuple[Rank, ...]
    surplus: tuple[PodView, ...]
    """Our pods that no rank needs."""
    observed: Observed
    clock: Clock
    changing: bool = False
    """The epoch that runs is over by the user's will: its deadlines are no longer those of the spec."""

    @property
    def pods(self) -> tuple[PodView, ...]:
        """All pods of ours."""
        return (*(rank.pod for rank in self.ranks if rank.pod is not None), *self.surplus)

    @property
    def settings(self) -> Settings:
        """The operator's own configuration."""
        return self.observed.settings

    def recall(self, status: Status) -> "Picture":
        """The same picture, with what this plan has put into status so far as the memory of each rank."""
        ranks = tuple(rank.with_record(status.runner(rank.rank)) for rank in self.ranks)
        same = all(map(operator.is_, ranks, self.ranks))
        return self if same else replace(self, ranks=ranks)


def who(rank: int, world_size: int, pod: str, node: str | None) -> str:
    """How messages name a rank."""
    return f"rank {rank}/{world_size} pod {pod}" + (f" on node {node}" if node else "")


def assigned(status: Status) -> bool:
    """The epoch was given to its pods: CreateRunner may have been sent. Recorded before it is, in one write."""
    epoch = status.epoch
    if epoch > 0:
        for record in status.runners:
            if record.epoch == epoch:
                return True
    return False


def asleep(status: Status) -> bool:
    """The instance was suspended: its epoch was given to pods that were then removed on purpose."""
    return assigned(status) and all(record.pod_uid is None for record in status.runners)


def effective(rank: Rank, epoch: int) -> RunnerState:
    """The state of a rank in an epoch: its report's, or what status remembers until there is one. Running is Ready."""
    if rank.record.epoch != epoch:
        return RunnerState.PENDING
    report = rank.in_epoch(epoch)
    state = rank.record.state if report is None else report.state
    return RunnerState.READY if state is RunnerState.RUNNING else state


def look(observed: Observed, wanted: Wanted, status: Status, clock: Clock) -> Picture:
    """Sort what was observed by rank."""
    views = [pods.view(pod) for pod in observed.pods]
    by_name = {pod.name: pod for pod in views}
    wanted_names = {names.pod_name(wanted.name, rank): rank for rank in range(wanted.world_size)}
    surplus = tuple(p for p in views if p.owner_uid == wanted.uid and p.name not in wanted_names)
    ranks = tuple(
        _rank(rank, by_name.get(name), observed, wanted, status, clock) for name, rank in wanted_names.items()
    )
    return Picture(wanted, status, ranks, surplus, observed, clock)


def former(picture: Picture, *, changing: bool) -> Picture:
    """The picture with the ranks that status knows of: as the group was before a change of the spec."""
    wanted, size = picture.wanted, len(picture.stored.runners)
    if size not in (0, wanted.world_size):
        wanted = replace(wanted, spec=wanted.spec.model_copy(update={"runners": size}))
        picture = look(picture.observed, wanted, picture.stored, picture.clock)
    return replace(picture, changing=changing)


def outdated(pod: PodView, picture: Picture) -> bool:
    """Its token is of another key of the operator: it lets us in no more, and its silence tells nothing."""
    wanted = picture.wanted
    current = names.secret_name(wanted.name, wanted.uid, picture.settings.key_id)
    return pod.token_secret is not None and pod.token_secret != current


def _rank(rank: int, found: PodView | None, observed: Observed, wanted: Wanted, status: Status, clock: Clock) -> Rank:
    ours = found is not None and found.owner_uid == wanted.uid
    pod = found if ours else None
    view = observed.runners.get(pod.uid, RunnerView()) if pod else RunnerView()
    report = view.report
    if report is not None and (report.instance_uid != wanted.uid or report.rank != rank):
        report = None
    silent = _silent(view, wanted.deadline("unreachable"), observed.settings, clock)
    return Rank(
        rank=rank,
        record=status.runner(rank),
        pod=pod,
        foreign=None if ours else found,
        view=view,
        report=report,
        node_lost=pod is not None and silent and _abandoned(pod, observed, clock),
        refusal=observed.refusals.get(names.pod_name(wanted.name, rank)),
        notes=observed.pod_events.get(pod.uid, ()) if pod else (),
    )


def _silent(view: RunnerView, deadline: timedelta, settings: Settings, clock: Clock) -> bool:
    """Whether a supervisor is out of touch. One that this process has not met yet gets its deadline first."""
    if view.connected:
        return view.received is not None and clock.now - view.received > deadline
    return view.report is not None or settings.started is None or clock.passed(settings.started + meeting(deadline))


def meeting(deadline: timedelta) -> timedelta:
    """`deadlines.unreachable` of a supervisor that this process has not met yet."""
    return max(deadline, timedelta(seconds=MEETING_SECONDS))


def _abandoned(pod: PodView, observed: Observed, clock: Clock) -> bool:
    """Its node is lost; without access to nodes: its deletion is long overdue."""
    if observed.settings.watch_nodes or pod.delete_by is None:
        return node_lost(pod.node, pod.deleting, observed)
    return pod.node is not None and clock.passed(pod.delete_by + timedelta(seconds=GONE_SECONDS))


def node_lost(node: str | None, deleting: bool, observed: Observed) -> bool:
    """Whether a node is gone. An unknown one counts only for a pod that is being deleted: news may still be due."""
    if node is None or not observed.settings.watch_nodes:
        return False
    known = observed.nodes.get(node)
    return deleting if known is None else not known.ready
