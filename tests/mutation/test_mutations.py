"""One field of a good spec is changed: the instance ends as one that was made so, or it is said what is wrong."""

import re

import pytest

from mlx_operator_api.schema import VALIDATIONS
from tests.mutation.campaign import Outcome
from tests.mutation.mutations import MUTATIONS, Mutation, Sort
from tests.mutation.schema import FIELDS, VALUE, dotted

_JARGON = re.compile(r"should match|json:|unmarshal|Go struct|no such key|evaluating")
# The campaign runs when the first test asks for its outcome.
pytestmark = pytest.mark.timeout(900)
each = pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])


def names_the_field(text: str, mutation: Mutation) -> bool:
    """Whether a text says which field is meant: by its path, or by its parent's path and its name."""
    # Of a value that it cannot even decode, the API server tells the path without indices.
    if mutation.where in text or re.sub(r"\[\d+\]", "", mutation.where) in text:
        return True
    parent, leaf = dotted(mutation.steps[:-1]), str(mutation.at[-1])
    if mutation.field.path[-1] == VALUE:
        # One key of two maps that contradict each other, such as limits and requests.
        parent = dotted(mutation.steps[:-2])
    return parent in text and leaf in text.replace(parent, "")


@each
def test_it_is_clear_what_becomes_of_it(mutation: Mutation, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[mutation.name]
    assert outcome.trouble is None
    said = outcome.refused or outcome.told
    if mutation.sort is Sort.BAD:
        assert said is not None, "a bad value is taken"
    if said is not None:
        assert names_the_field(said, mutation), said
        assert not _JARGON.search(said), said
    if outcome.told is not None:
        assert "; " in outcome.told and "correct " in outcome.told.rpartition("; ")[2], "it says what to do"


@each
def test_a_change_ends_as_if_the_instance_was_made_with_it(mutation: Mutation, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[mutation.name]
    assert outcome.differs == []
    assert (outcome.refused is None) == (outcome.refused_change is None), outcome
    assert (outcome.told is None) == (outcome.told_change is None), outcome


RULES = [(field.name, rule["message"]) for field in FIELDS.values() for rule in field.node.get(VALIDATIONS, ())]


@pytest.mark.parametrize(("name", "message"), RULES, ids=[f"{name} {message[:40]}" for name, message in RULES])
def test_every_rule_of_the_schema_refuses_something(name: str, message: str, outcomes: dict[str, Outcome]) -> None:
    remedy = message.rpartition(": ")[2]
    below = [mutation for mutation in MUTATIONS if mutation.field.name.startswith(name)]
    assert any(remedy in (outcomes[mutation.name].refused or "") for mutation in below)
