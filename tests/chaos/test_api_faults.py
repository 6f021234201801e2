"""Every fault of the API server that the table has: nothing is lost, nothing is doubled, nobody spins."""

from functools import partial
from typing import cast

import pytest

from tests.chaos.drill import Outcome, drill
from tests.chaos.faults import FAULTS, ApiFault
from tests.chaos.pool import Outcomes, chosen, side_by_side
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
