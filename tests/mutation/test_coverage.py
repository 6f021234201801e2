"""Nothing of the schema is left out, and the table of values speaks of nothing that is not there."""

import copy

import pytest

from tests.mutation.mutations import MUTATIONS, Sort
from tests.mutation.schema import FIELDS, fields, served
from tests.mutation.values import TABLE

PROPERTIES = [name for name in FIELDS if name != "spec"]


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_property_is_given_good_values_and_bad_ones(name: str) -> None:
    sorts = {mutation.sort for mutation in MUTATIONS if mutation.field.name == name}
    assert sorts == set(Sort), f"{name}: give it a value in GOOD of values.py, and a row in TABLE"


@pytest.mark.parametrize("name", TABLE)
def test_every_row_of_the_table_is_of_a_property(name: str) -> None:
    assert name in FIELDS


def test_a_property_that_the_schema_gets_is_seen() -> None:
    schema = copy.deepcopy(served())
    schema["properties"]["runner"]["properties"]["hostNetwork"] = {"type": "boolean"}
    assert {field.name for field in fields(schema)} - set(FIELDS) == {"spec.runner.hostNetwork"}


def test_no_two_mutations_have_one_name() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
