"""`plan()`: from what was observed to the status to write, the actions and the events. Pure.

The rules stand in the order of the lifecycle: invalid spec, failure of the epoch, suspend, new epoch (spec, template,
annotations), start of the epoch, children, tasks. Status carries all memory: the same observation and status always
give the same plan, and a plan that was carried out gives an empty one.
"""

from dataclasses import replace
from datetime import datetime

from mlx_operator_api.conditions import Reason
from mlx_operator_api.runner import TRANSIENT
from mlx_operator_api.status import Status

from . import (
    children,
    departures,
    downloads,
    epoch,
    events,
    facts,
    failure,
    keys,
    picture,
    problems,
    restart,
    runners,
    tasks,
    writes,
)
from .actions import Plan
from .facts import Situation
from .halts import Unusable, refuse, suspend
from .observed import Observed
from .picture import Clock, Picture
from .spec import InvalidSpecError, parse, remembered
from .stored import finish, read


def plan(observed: Observed, now: datetime) -> Plan:
    """Decide what is to be done for one ModelInstance."""
    old, clock = read(observed.instance), Clock(now)
    if observed.instance["metadata"].get("deletionTimestamp"):
        # The garbage collector removes the children; they drain by themselves.
        return Plan(old)
    fault: Unusable | None = None
    try:
        wanted = parse(observed.instance)
    except InvalidSpecError as error:
        fault = Unusable(Reason.INVALID_SPEC, str(error))
        known = remembered(observed.instance, old)
        if known is None:
            return refuse(observed.instance, old, None, fault, clock)
        wanted = known
    view = picture.look(observed, wanted, old, clock)
    if fault is not None and not wanted.suspended:
        return refuse(observed.instance, old, picture.former(view, changing=True), fault, clock)
    return _follow(view, old, fault)


def _follow(view: Picture, old: Status, fault: Unusable | None) -> Plan:
    wanted = view.wanted
    status = old.revised(restarts=restart.spent(old, wanted.restarts, view.clock))
    why = Reason.SUSPENDED if wanted.suspended else epoch.due(view, status)
    if why is Reason.SPEC_CHANGED and not view.observed.turn and keys.may_wait(view, status):
        return Plan(old, tuple(children.service_of(view)), requeue_at=keys.again(view), waits=True)
    if why is not Reason.EPOCH_STARTED:
        # Where status knows of no epoch, or of an older one than the runners, its records prove nothing.
        past = picture.former(view, changing=why is not None)
        status = failure.examine(past.recall(status), status)
        if why is not None and failure.unwritten(old, status):
            return _tell_first(past, status)
    return suspend(view, status, fault) if wanted.suspended else _go_on(view, status)


def _tell_first(past: Picture, status: Status) -> Plan:
    """A failure and a change at once: the failure is written as the group was, then the change is followed."""
    if restart.open_failure(status) is not None:
        past.clock.wakes.append(past.clock.now)
    status = runners.update(past.recall(status), status)
    return replace(_conclude(past.recall(status), status, None), actions=())


def _go_on(view: Picture, status: Status) -> Plan:
    status, opened = epoch.begin(view, status)
    status = epoch.start(view.recall(status), status)
    status = downloads.note(view.recall(status), status)
    status = runners.update(view.recall(status), status)
    return _conclude(view.recall(status), status, opened)


def _conclude(view: Picture, status: Status, opened: Reason | None) -> Plan:
    leftover = departures.unneeded(view, view.surplus)
    situation = Situation(view, status, problems.find(view, status), leftover=leftover)
    status = finish(status, facts.all_of(situation), view.stored, view.wanted.generation, view.clock)
    told = events.tell(view.stored, Situation(view, status, situation.problem), opened)
    sent = tasks.send(view, status)
    # A state with a deadline is recorded all the same: its time counts from there.
    moving = bool(sent) and not any(record.state in TRANSIENT for record in status.runners)
    written = writes.worth_writing(view.stored, status, view.clock, moving=moving)
    actions = (*children.keep(view, status), *sent)
    return Plan(written, actions, told if written is status else (), view.clock.requeue_at)
