"""Every fault of the API server that the table has: nothing is lost, nothing is doubled, nobody spins."""

import asyncio
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from tests.chaos.drill import Outcome, drill
from tests.chaos.faults import FAULTS, ApiFault
from tests.chaos.pool import Outcomes, chosen, side_by_side
from tests.chaos.rules import Cut, Rule
from tests.chaos.stage import stage
from tests.cluster.apiserver import ApiServer

SIDE_BY_SIDE = [row for row in FAULTS if row.at_once]
ALONE = [row for row in FAULTS if not row.at_once]


@pytest.fixture(scope="module")
def outcomes(
    api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Outcomes[Outcome]:
    rows = [cast(ApiFault, row) for row in chosen(request, "beside")]
    return side_by_side({row.id: partial(drill, api_server, tmp_path_factory.mktemp(row.id), row) for row in rows})


@pytest.mark.timeout(900)  # the first one waits for all
@pytest.mark.parametrize("beside", SIDE_BY_SIDE, ids=lambda row: row.id)
def test_an_operator_gets_over(outcomes: Outcomes[Outcome], beside: ApiFault) -> None:
    outcome = outcomes.of(beside.id)
    print(outcome)
    assert outcome.row is beside


@pytest.mark.parametrize("row", ALONE, ids=lambda row: row.id)
async def test_an_operator_gets_over_an_api_server_that_goes(
    api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory, row: ApiFault
) -> None:
    print(await drill(api_server, tmp_path_factory.mktemp(row.id), row))


async def test_a_discovery_that_breaks_off_ends_the_operator_with_a_word_and_its_successor_serves(
    api_server: ApiServer, tmp_path: Path
) -> None:
    async with stage(api_server, "discovery", tmp_path) as staged:
        flags = staged.through(staged.proxy)
        async with staged.proxy.trouble(Rule(lambda call: call.path == "/api/v1", Cut())):
            operator = await staged.place.operator(*flags, ready=False)
            assert await asyncio.wait_for(operator.process.wait(), 60) == 1, operator.lines()
        assert "the watches ended, exiting" in operator.lines().strip().splitlines()[-1]
        await staged.place.operator(*flags)
        await staged.place.create(runners=1)
        await staged.place.until_ready()
        staged.check([operator])
