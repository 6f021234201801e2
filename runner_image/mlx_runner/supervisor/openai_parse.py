"""Validation of request bodies: what is wrong is told by the name of its field, nothing is silently ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError
from pydantic_core import PydanticCustomError

from .json_values import encodable
from .openai_errors import ApiError, invalid, unsupported

HARMLESS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
)
"""Fields that are about the caller's bookkeeping and change no answer."""


Text = Annotated[StrictStr, AfterValidator(encodable)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]


class Strict(BaseModel):
    """A part of a body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Body(Strict):
    """A whole body."""

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Fields that are not supported, with the values that ask for nothing and so may pass (null always may)."""
    HARMLESS: ClassVar[frozenset[str]] = HARMLESS


_B = TypeVar("_B", bound=Body)


def validated(model: type[_B], body: Any) -> _B:
    """Read a body; raises `ApiError` 400 with the field's name."""
    try:
        return model.model_validate(_supported(model, body))
    except ValidationError as error:
        raise _api_error(error) from error


def wrong(field: str, message: str, kind: str = "invalid_value") -> PydanticCustomError:
    """For validators that look at several fields: which one is wrong. `kind`: a code of `openai_errors`."""
    # The text may hold braces of a template: it is given as a value.
    return PydanticCustomError(kind, "{text}", {"text": message, "field": field})


def _supported(model: type[Body], body: Any) -> dict[str, Any]:
    """The body without fields that ask for nothing."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_value")
    kept = {}
    for name, value in body.items():
        if name in model.HARMLESS:
            continue
        if name not in model.NEUTRAL:
            kept[name] = value
        elif value is not None and not any(_same(value, neutral) for neutral in model.NEUTRAL[name]):
            raise unsupported(name, value, "leave the field out")
    return kept


def _same(value: object, neutral: object) -> bool:
    """Equal, and no boolean for a number: `n=true` is not `n=1`."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


_NAMED = frozenset({"extra_forbidden", "missing"})
"""Complaints about a field by its name, which ends their location: any text may be the name of an unknown one."""


def _api_error(error: ValidationError) -> ApiError:
    # Of a union every branch complains; the deepest complaint is about the branch that was meant.
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    # A union's branches are parts of the location; a client knows only the names and indices it sent.
    named = len(first["loc"]) - (first["type"] in _NAMED)
    parts = [p for p in first["loc"][:named] if isinstance(p, int) or (p.isidentifier() and not _branch(p))]
    parts += first["loc"][named:]
    parts += [first["ctx"]["field"]] if "field" in first.get("ctx", {}) else []
    where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).removeprefix(".") if parts else "body"
    match first["type"]:
        case "extra_forbidden":
            return ApiError(400, f"unrecognized request argument: {where}", code="unknown_parameter", param=where)
        case "missing" | "missing_required_parameter":
            return ApiError(400, f"missing required parameter: {where}", code="missing_required_parameter", param=where)
        case "none_required":
            return unsupported(where, first["input"], "leave the field out")
        case "unsupported_parameter" | "invalid_value":
            return ApiError(400, f"{where}: {first['msg']}", code=first["type"], param=where)
        case _:
            words = first["msg"].removeprefix("Value error, ")  # pydantic's, about a validator of ours
            return invalid(where, f"{words}, not {first['input']!r}"[:300])


def _branch(part: str) -> bool:
    """A model of a union, by its name, or a type of pydantic's."""
    return part in {"str", "int", "float", "list", "constrained", "none", "dict"} or part[:1].isupper()
