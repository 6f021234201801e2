"""Figures as text: what was compared with what, and by how much they differ."""

from collections.abc import Callable, Sequence

from .measure import Figures, Plan
from .servers import Shape

_WIDTHS = (34, 14, 14, 10)


def render(results: Sequence[tuple[Shape, list[Figures]]], plan: Plan, machine: str) -> str:
    """One table for each shape."""
    head = [
        "",
        f"mlx-operator against mlx_lm.server, over HTTP, interleaved: {machine}",
        f"random qwen2 of 94 M parameters in float32, prompts of {plan.prompt} tokens, answers of {plan.answer},",
        f"greedy, streamed; all requests of a round at once; rounds: {plan.rounds}. A late short request comes",
        f"{plan.late_after} s after a prompt of {plan.long} tokens, while {plan.late_beside} answers are under way. "
        "Ratios are mlx-operator / mlx_lm.server.",
    ]
    return "\n".join([*head, *(_shape(shape, figures, plan) for shape, figures in results)])


def _shape(shape: Shape, figures: list[Figures], plan: Plan) -> str:
    ours, theirs = figures
    lines = ["", _row(str(shape), "mlx-operator", "mlx_lm.server", "ratio"), "-" * sum(_WIDTHS)]

    def compare(what: str, figure: Callable[[Figures], float], digits: int = 0) -> None:
        mine, other = figure(ours), figure(theirs)
        ratio = f"{mine / other:.2f}x" if other else "-"
        lines.append(_row(what, f"{mine:.{digits}f}", f"{other:.{digits}f}", ratio))

    for at in plan.concurrencies:
        compare(f"tokens/s, concurrency {at}", lambda f, at=at: f.speed(at), 1)  # type: ignore[misc]
    for at in plan.concurrencies:
        for percent in (50, 99):
            what = f"first token p{percent} ms, concurrency {at}"
            compare(what, lambda f, at=at, percent=percent: f.first(at, percent))  # type: ignore[misc]
    for at in plan.concurrencies:
        compare(f"CPU ms a token, concurrency {at}", lambda f, at=at: f.cost(at), 1)  # type: ignore[misc]
    compare("late short request ms", lambda f: sorted(f.late)[len(f.late) // 2])
    cores = [" ".join(f"{core:.3f}" for core in f.idle) for f in figures]
    lines.append(_row("idle cores, by rank", *cores, ""))
    pairs = [(a, b) for at in plan.concurrencies for a, b in zip(ours.texts(at), theirs.texts(at), strict=True)]
    # mlx_lm.server leaves out the space that an answer begins with.
    lines.append(f"equal answers: {sum(a.strip() == b.strip() for a, b in pairs)} of {len(pairs)}")
    return "\n".join(lines)


def _row(*cells: str) -> str:
    first, *rest = cells
    return first.ljust(_WIDTHS[0]) + "".join(cell.rjust(width) for cell, width in zip(rest, _WIDTHS[1:], strict=False))
