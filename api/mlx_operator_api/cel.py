"""CEL rules as a JSON-schema extra (`x-kubernetes-validations`)."""

from typing import Any


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
    return {"x-kubernetes-validations": [validation]}
