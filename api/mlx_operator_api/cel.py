"""CEL rules as a JSON-schema extra (`x-kubernetes-validations`)."""

from typing import Any

_VALIDATIONS = "x-kubernetes-validations"


def cel(*, rule: str, message: str, expression: str | None = None, field_path: str | None = None) -> dict[str, Any]:
    """One rule.

    Args:
        rule: CEL, true when the value is good.
        message: what a user reads when it is not; also the fallback of `expression`.
        expression: CEL that makes the message from the value (`messageExpression`).
        field_path: where the error points to, relative to the node.
    """
    validation: dict[str, Any] = {"rule": rule, "message": message}
    if expression is not None:
        validation["messageExpression"] = expression
    if field_path is not None:
        validation["fieldPath"] = field_path
    return {_VALIDATIONS: [validation]}


def text_rule(rule: str, complaint: str) -> dict[str, Any]:
    """A rule on a string whose message starts with the value.

    Kubernetes before 1.34 prints the type in place of the value, so the message carries it.

    Args:
        rule: CEL, true when the value is good.
        complaint: what is wrong and what to write instead, as it follows the value.
    """
    if "'" in complaint or "\\" in complaint:
        raise ValueError(f"a complaint must not need quoting in CEL: {complaint!r}")
    return cel(rule=rule, message=complaint, expression=f"self + ' {complaint}'")


def rules(*each: dict[str, Any]) -> dict[str, Any]:
    """Several rules on one node; all are reported at once."""
    return {_VALIDATIONS: [validation for one in each for validation in one[_VALIDATIONS]]}
