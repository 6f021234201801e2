"""Short random walks: what `make soak` does for as long as it is asked to."""

from pathlib import Path

import pytest

from tests.chaos.walk import walk
from tests.cluster.apiserver import ApiServer

ROUNDS = 3


@pytest.mark.parametrize("seed", [3])
async def test_all_is_well_after_every_round_of_faults(api_server: ApiServer, tmp_path: Path, seed: int) -> None:
    assert await walk(api_server, tmp_path, seed, going_on=lambda number: number < ROUNDS) == ROUNDS
