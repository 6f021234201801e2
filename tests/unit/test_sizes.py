"""Sizes as people and as Kubernetes write them."""

import pytest

from mlx_operator.decide.spec import InvalidSpecError, parse
from mlx_operator_api.sizes import human_size, quantity
from tests.unit.simulator import Cluster


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0), (17, 17), ("17", 17), ("1k", 1000), ("20Gi", 20 * 2**30), ("1.5G", 1_500_000_000), (".5Ki", 512),
        ("5.", 5), ("1e3", 1000), ("1E3", 1000), ("1E", 10**18), ("1500m", 2), ("2Ei", 2**61), ("+3M", 3_000_000),
    ],
)  # fmt: skip
def test_a_quantity_is_bytes(text: str | int, size: int) -> None:
    assert quantity(text) == size


@pytest.mark.parametrize("text", ["", "Gi", "1 Gi", "1Zi", "1ki", "1e", "0x10", "1,5G"])
def test_what_is_no_quantity_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="is no quantity: write a number with an optional unit, for example 500M"):
        quantity(text)


@pytest.mark.parametrize("text", ["1e40", "1e999", "9" * 64, "1e999Ki", "1e999999999", "1e-999999999"])
def test_a_number_that_would_fill_the_memory_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match="write a"):
        quantity(text)


def test_a_stored_limit_that_is_none_names_its_field() -> None:
    for text in ("much", ""):
        with pytest.raises(InvalidSpecError, match=rf"^spec\.cache\.sizeLimit: '{text}' is no quantity"):
            parse(Cluster(cache={"sizeLimit": text}).instance)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (3_400_000, "3.4 MB"), (10**13, "10.0 TB")])
def test_people_read_powers_of_a_thousand(size: int, text: str) -> None:
    assert human_size(size) == text
