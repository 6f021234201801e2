"""How the operator tells what it could not hear from a runner."""

import socket

import aiohttp
import pytest
from pydantic import ValidationError

from mlx_operator.act.runner import describe, first_error
from mlx_operator_api.tasks import RunnerReport
from tests.unit.manifests import report


async def test_a_refused_connection_is_told_with_address_and_the_kernels_word() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientConnectorError) as failed:
                await session.get(f"http://127.0.0.1:{port}/", timeout=aiohttp.ClientTimeout(total=5))
    assert describe(failed.value) == f"cannot connect to 127.0.0.1:{port}: Connection refused"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": "RunnerDreaming"}, "state: 'RunnerDreaming' is no word of this release"),
        ({"epoch": "two"}, "epoch: Input should be a valid integer"),
    ],
)
def test_a_report_that_cannot_be_read_is_told_by_its_field_and_value(change: dict[str, object], words: str) -> None:
    told = report().model_dump(mode="json", by_alias=True) | change
    with pytest.raises(ValidationError) as failed:
        RunnerReport.model_validate(told)
    assert first_error(failed.value).startswith(words)
