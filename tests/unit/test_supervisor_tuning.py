"""What a warm-up measured is told to the next engine that does the same work, and to no other."""

import pytest

from mlx_operator_api.tasks import Sharding
from mlx_runner.channel import Load
from mlx_runner.supervisor.tuning import Tuning

LOAD = Load(
    path="/models/tiny",
    served_name="tiny",
    rank=0,
    world_size=2,
    sharding=Sharding.PIPELINE,
    max_concurrent_requests=8,
)


def test_nothing_is_known_before_the_first_warm_up() -> None:
    assert Tuning().known(LOAD) is None


def test_the_same_work_is_not_measured_again_also_beside_a_spare() -> None:
    tuning = Tuning()
    tuning.learn(LOAD, 12)
    assert tuning.known(LOAD) == 12
    assert tuning.known(LOAD.model_copy(update={"spare_bytes": 1})) == 12


@pytest.mark.parametrize(
    "other", [{"path": "/models/other"}, {"world_size": 3}, {"memory_limits": (1, 2)}, {"max_concurrent_requests": 9}]
)
def test_other_work_is_measured_and_then_known_instead(other: dict[str, object]) -> None:
    tuning, changed = Tuning(), LOAD.model_copy(update=other)
    tuning.learn(LOAD, 12)
    assert tuning.known(changed) is None
    tuning.learn(changed, None)
    assert tuning.known(changed) is None
    assert tuning.known(LOAD) is None
