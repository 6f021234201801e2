"""The figures for a person: ratios and counts."""

from collections.abc import Iterator

from tests.scale.memory import Parts
from tests.scale.stages import RUNNERS, Figures, Stage

LEADER_WORKER_SET = (13.3, 4.1)
"""Its writes and Events for a group of a leader and a worker, to compare with."""


def text(stage: Stage, figures: Figures) -> str:
    """What a stage has shown."""
    lines = {Stage.READY: _ready, Stage.IDLE: _idle, Stage.RESTART: _restart, Stage.DEATHS: _deaths}
    return "\n".join(lines[stage](figures))


def _ready(figures: Figures) -> Iterator[str]:
    size, counts = figures.size, figures.writes
    writes, events = LEADER_WORKER_SET
    most = max(counts.each(name) for name in counts.status)
    yield f"from nothing to Ready: {size.instances} instances of {RUNNERS} runners in {figures.ready_seconds:.1f} s"
    yield f"  operator's CPU: {1000 * figures.cpu_to_ready / size.instances:.0f} ms an instance"
    status, children = (_sum(each) / size.instances for each in (counts.status, counts.children))
    yield f"  writes an instance: {status + children:.1f}, at most {most} (LeaderWorkerSet {writes})"
    yield f"    status {status:.1f}, children {children:.1f}"
    told = _sum(counts.events) / size.instances
    yield f"  events an instance: {told:.1f}, at most {max(counts.events.values())} (LeaderWorkerSet {events})"


def _idle(figures: Figures) -> Iterator[str]:
    yield f"idle for {figures.size.idle_seconds:g} s: {len(figures.idle_writes)} writes"
    yield f"  operator's CPU: {100 * figures.idle_cpu:.1f} % of a core, {figures.streams:.0f} report streams"
    now, high = figures.memory
    yield f"  memory {now:.0f} MiB resident, highest {high:.0f}; {figures.kib_each[0]:.0f} KiB an instance"


def made_of(figures: Figures, parts: Parts) -> str:
    """What the memory of the restarted operator consists of."""
    stored, streaming = parts.stored - parts.imports, parts.streaming - parts.stored
    rest, each = figures.restarted_memory[0] - parts.streaming, 1024 * streaming / parts.streams
    return "\n".join(
        (
            f"memory after the restart: {figures.restarted_memory[0]:.0f} MiB",
            f"  imports {parts.imports:.0f} MiB (an operator without instances: {figures.empty_memory:.0f} MiB)",
            f"  {parts.objects} objects {stored:.0f} MiB: {1024 * stored / parts.objects:.1f} KiB each",
            f"  {parts.streams} streams with their reports {streaming:.0f} MiB: {each:.1f} KiB each",
            f"  the rest, kopf's records and what lists left behind: {rest:.0f} MiB",
        )
    )


def _restart(figures: Figures) -> Iterator[str]:
    yield f"restart: converged in {figures.restart_seconds:.1f} s with {len(figures.restart_writes)} writes"
    now, high = figures.restarted_memory
    yield f"  operator's CPU {figures.restart_cpu:.1f} s, memory {now:.0f} MiB resident, highest {high:.0f}"
    yield f"    {figures.kib_each[1]:.0f} KiB an instance"


def _deaths(figures: Figures) -> Iterator[str]:
    counts, hit = figures.heal_writes, len(figures.heal_writes.status)
    killed, seconds = figures.size.killed, figures.healed_seconds
    yield f"{killed} runners killed at once, in {hit} instances: all Ready again in {seconds:.1f} s"
    yield f"  wrong causes {len(figures.wrong_causes)}, others with a failure {len(figures.unaffected_touched)}"
    yield f"  status writes an instance {_sum(counts.status) / hit:.1f}, events {_sum(counts.events) / hit:.1f}"
    yield from (f"  wrong: {name}: {why}" for name, why in figures.wrong_causes.items())


def _sum(counter: dict[str, int]) -> int:
    return sum(counter.values())
