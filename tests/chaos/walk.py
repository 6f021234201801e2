"""Random walks: all faults together, then rest, again and again. The seed says what happens, and in which order."""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.cast import cast
from tests.chaos.steps import draw, quietly
from tests.cluster.apiserver import ApiServer

BRIEF_OUTAGES = (0.0, 2.0)
ALL_OUTAGES = (0.0, 2.0, 8.0, 20.0, 120.0)
_STEPS = (3, 7)


async def walk(
    server: ApiServer,
    folder: Path,
    seed: int,
    *,
    going_on: Callable[[int], bool],
    outages: tuple[float, ...] = BRIEF_OUTAGES,
    tell: Callable[[str], None] = print,
) -> int:
    """Rounds of steps that overlap, and a rest after each, as long as `going_on(round)` says.

    Returns:
        How many rounds there were.
    """
    number = 0
    async with cast(server, f"walk-{seed}-{int(time.time())}", folder, seed) as actors:
        while going_on(number):
            # A round's own source: what one round used up does not change the next.
            chance = random.Random(f"{seed}/{number}")  # noqa: S311 (a walk is no secret)
            under_way = []
            for _ in range(chance.randint(*_STEPS)):
                step = draw(actors, chance, outages)
                tell(f"seed {seed} round {number}: {step.what}")
                under_way.append(asyncio.create_task(quietly(step), name=step.what))
                await asyncio.sleep(chance.uniform(0.0, 2.5))
            await asyncio.gather(*under_way)
            took = await actors.rest()
            number += 1
            tell(f"seed {seed} round {number - 1}: all Ready {took:.1f} s after its end")
    return number
