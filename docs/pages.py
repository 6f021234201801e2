"""The generated reference pages as text.

What they say of a reason, a field or a state stands in api/, once; here is only how it is laid out.
"""

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

from docs import faulttable
from mlx_operator_api import crd, names
from mlx_operator_api.conditions import ConditionType, Reason, Retry
from mlx_operator_api.runner import REQUESTS, TRANSIENT, TRANSITIONS, RunnerState, Transition
from mlx_operator_api.schema import INT_OR_STRING, PRESERVE, VALIDATIONS
from mlx_runner.engine import architectures
from tests.changes import CHANGES
from tests.faults import Layer, declared

RETRY_WORDS: Mapping[Retry, str] = {
    Retry.RESTART: "the group starts again after the back-off; each failure spends one of "
    "`spec.restartPolicy.maxRestarts`",
    Retry.FREE: "the group starts again after the back-off; the budget is not touched",
    Retry.NEVER: "not retried: `Stalled` until the spec changes or the annotation `mlx-operator.dev/retry` gets a new "
    "value",
    Retry.WAIT: "nothing is restarted; what is missing is picked up by itself when it appears",
    Retry.NONE: "no failure",
}
# The catalogue stands in the order of the lifecycle; a section goes from its first reason to that of the next.
SECTIONS: tuple[tuple[Reason, str, str], ...] = (
    (Reason.UNKNOWN, "Steps of the lifecycle", "No failure. Set by the operator."),
    (Reason.INVALID_SPEC, "The spec", "Set by the operator before it does anything else."),
    (Reason.CHILD_CONFLICT, "Pods and nodes", "Set by the operator; the message carries Kubernetes' own words."),
    (
        Reason.SOURCE_UNSUPPORTED,
        "The model",
        "Reported by a runner's supervisor while it looks for or reads the files.",
    ),
    (
        Reason.CONNECT_TIMEOUT,
        "Runners of an epoch",
        "Reported by a runner's supervisor; where that is silent, set by the operator when a deadline has passed.",
    ),
    (Reason.RUNNER_UNREACHABLE, "Seen by the operator alone", "Set by the operator."),
)

_TROUBLESHOOTING = """\
# Troubleshooting

Generated from `api/mlx_operator_api/conditions.py`: do not edit.

Start with `kubectl describe mi NAME`. `Status.Brief` says in a few lines what is going on: the headline, one line for
each rank (the cause first), what happens next, and what to do. Every message follows one order: *who*, *what*,
*evidence*, *next step*.

- `kubectl get mi` shows the reason of the `Ready` condition; find it below.
- `kubectl wait --for=condition=Ready mi/NAME` returns when it answers; `--for=condition=Stalled` when somebody has to
  act.
- `status.runners[].lastFailure` and `status.history` keep what happened, over restarts of everything.
- `kubectl logs POD` of a rank: one line for every task and its outcome, such as `LoadModel accepted: …`.
- `kubectl annotate mi NAME mlx-operator.dev/retry=$(date +%s) --overwrite` starts again after `Stalled`;
  `mlx-operator.dev/restart=…` starts a new epoch now.

## Conditions

| Condition | Meaning |
| --- | --- |
"""


def troubleshooting() -> str:
    """docs/troubleshooting.md: each condition, and each reason with meaning, retry and remedy."""
    meanings = docstrings(ConditionType)
    lines = [_TROUBLESHOOTING.rstrip("\n")]
    lines += [f"| `{kind}` | {_cell(meanings[kind.name])} |" for kind in ConditionType]
    starts = [section[0].ordinal for section in SECTIONS] + [len(Reason)]
    for (_, title, who), (first, last) in zip(SECTIONS, itertools.pairwise(starts), strict=True):
        lines += ["", f"## {title}", "", who]
        reasons = list(Reason)[first:last]
        if first == 0:
            lines += _steps(reasons)
            continue
        for reason in reasons:
            lines += ["", f"### {reason}", "", reason.meaning, "", f"- Retry: {RETRY_WORDS[reason.retry]}."]
            if reason.remedy:
                lines.append(f"- What to do: {reason.remedy}.")
            lines += _example(reason)
    return "\n".join(lines) + "\n"


def _example(reason: Reason) -> Iterator[str]:
    """How `kubectl describe` begins where a test has brought it about."""
    row = next((row for row in declared() if row.layer is Layer.OPERATOR and row.reason is reason), None)
    if row is None or not row.golden.exists():
        return
    found = _BRIEF.search(row.golden.read_text(encoding="utf-8"))
    yield f"- Seen, for example, with {row.what} ([the whole text]({faulttable.link(row)})):"
    yield ""
    for line in textwrap.dedent(found["lines"]).splitlines() if found else ():
        yield f"      {line}"


def _steps(reasons: Sequence[Reason]) -> Iterator[str]:
    yield from ("", "| Reason | Meaning | What to do |", "| --- | --- | --- |")
    for reason in reasons:
        yield f"| `{reason}` | {_cell(reason.meaning)} | {_cell(reason.remedy)} |"


_API = """\
# ModelInstance

Generated from the models in `api/mlx_operator_api`: do not edit. `kubectl explain mi.spec` shows the same texts.

`{api_version}`, kind `{kind}`, short name `{short}`, category `{category}`, namespaced. The name has at most
{length} characters, starts with a letter and holds only a-z, 0-9 and -.

Nothing is immutable: a change that needs it starts a new epoch, or replaces the pods. Defaults are not written into the
object. A field in **bold** is required. "Refused" lists what the API server answers to a bad value.

| Annotation | Meaning |
| --- | --- |
| `{retry}` | Any new value starts again after `Stalled`. |
| `{restart}` | Any new value starts a new epoch now, or on resume; also with a newer default runner image. |
"""
_BRIEF = re.compile(r"^Status:\n  Brief:\n(?P<lines>(?: {4}.*\n)+)", re.MULTILINE)
_DEFAULT = re.compile(r" ?Default: (?P<value>[^.]+(?:\.[^ .][^.]*)*)\.")


def api() -> str:
    """docs/api.md: every field with its type, default and meaning."""
    head = _API.format(
        api_version=names.API_VERSION,
        kind=names.KIND,
        short=names.SHORT_NAME,
        category=names.CATEGORY,
        length=names.MAX_NAME_LENGTH,
        retry=names.RETRY_ANNOTATION,
        restart=names.RESTART_ANNOTATION,
    )
    properties = crd.schema()["properties"]
    lines = [head.rstrip("\n")]
    for name in ("spec", "status"):
        lines += _object(name, properties[name], level=2)
    return "\n".join(lines) + "\n"


def _object(path: str, node: Mapping[str, Any], level: int) -> Iterator[str]:
    """The section of one object, then those of the objects in it."""
    required = set(node.get("required", ()))
    fields: Mapping[str, Any] = node["properties"]
    with_default = any(_DEFAULT.search(field["description"]) for field in fields.values())
    yield from ("", f"{'#' * level} {path}", "", node["description"], "")
    yield "| Field | Type | Default | Meaning |" if with_default else "| Field | Type | Meaning |"
    yield "| --- | --- | --- | --- |" if with_default else "| --- | --- | --- |"
    for name, field in fields.items():
        default = _DEFAULT.search(field["description"])
        meaning = _DEFAULT.sub("", field["description"]).strip()
        cells = [f"**`{name}`**" if name in required else f"`{name}`", _type(field)]
        cells += [default["value"] if default else ""] if with_default else []
        yield "| " + " | ".join(_cell(cell) for cell in [*cells, meaning]) + " |"
    refusals = [*_refusals("", node), *(line for name, field in fields.items() for line in _refusals(name, field))]
    if refusals:
        yield from ("", "Refused:", "", *refusals)
    for name, field in fields.items():
        inner = field.get("items", field)
        if "properties" in inner:
            suffix = "[]" if "items" in field else ""
            shown = {**inner, "description": field["description"]}
            yield from _object(f"{path}.{name}{suffix}", shown, min(level + 1, 4))


def _type(field: Mapping[str, Any]) -> str:
    if field.get(INT_OR_STRING):
        return "quantity"
    if "enum" in field:
        return " or ".join(f"`{word}`" for word in field["enum"])
    match field["type"]:
        case "array":
            return f"list of {_type(field['items'])}"
        case "object" if isinstance(field.get("additionalProperties"), dict):
            return f"map of {_type(field['additionalProperties'])}"
        case "object" if field.get(PRESERVE):
            return "object, as in a pod spec"
        case "integer":
            return f"integer{_range(field)}"
        case "string" if field.get("format") == "date-time":
            return "time"
        case kind:
            return str(kind)


def _range(field: Mapping[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    if high is not None and field.get("exclusiveMaximum"):
        high -= 1
    if low is None:
        return ""
    return f", {low} or more" if high is None else f", {low} to {high}"


def _refusals(name: str, field: Mapping[str, Any]) -> Iterator[str]:
    if name and "properties" in field:
        return  # told where the object itself is described
    values = field.get("additionalProperties")
    of = f"`{name}`: " if name else ""
    for node in (field, values if isinstance(values, dict) else {}):
        for rule in node.get(VALIDATIONS, ()):
            yield f"- {of}{rule['message']}"


def transitions() -> str:
    """The transition table of the runner."""
    lines = [
        "| Task | Accepted in, alone | Accepted in, as one of several | Goes through | Ends in |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task, row in TRANSITIONS.items():
        sender = " (from clients)" if task in REQUESTS else ""
        cells = [f"`{task}`{sender}", _states(row.single), _states(row.group), _state(row.via), _state(row.to, row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _states(states: frozenset[RunnerState]) -> str:
    missing = [state for state in RunnerState if state not in states]
    if not states:
        return "never"
    if not missing:
        return "every state"
    if len(missing) == 1:
        return f"every state but {missing[0]}"
    return ", ".join(state for state in RunnerState if state in states)


def _state(state: RunnerState | None, row: Transition | None = None) -> str:
    if state is not None:
        return str(state)
    return "" if row is None else "the state stays"


def ports() -> str:
    """The ports of a runner pod."""
    rows = [
        (str(names.PUBLIC_PORT), "OpenAI-compatible API of rank 0"),
        (str(names.CONTROL_PORT), "control API, reports, probes and metrics of every rank"),
        (str(names.FRAME_PORT), "frames between ranks: the lower rank listens, the higher dials"),
        (
            f"{names.RING_PORT_BASE}-{names.RING_PORT_BASE + names.RING_PORT_COUNT - 1}",
            "MLX ring, with `sharding: Tensor`: another port for each epoch",
        ),
    ]
    return "\n".join(["| Port | Use |", "| --- | --- |", *(f"| {port} | {use} |" for port, use in rows)]) + "\n"


def changes() -> str:
    """What a change of a running instance replaces."""
    rows = [f"| {change.what} | {change.replaces} |\n" for change in sorted(CHANGES, key=lambda c: c.replaces)]
    return "| Change | Replaces |\n| --- | --- |\n" + "".join(rows)


def models() -> str:
    """The table of architectures that are tested."""

    def tensor(name: str) -> str:
        if name not in architectures.TENSOR:
            return ""
        return "2" if name in architectures.TENSOR_TWO_ONLY else "2, 3"

    rows = [f"| `{name}` | 1, 2, 3 | {tensor(name)} |\n" for name in architectures.PIPELINE]
    head = "| Architecture | Ranks tested with Pipeline | Ranks tested with Tensor |\n| --- | --- | --- |\n"
    return head + "".join(rows)


def states() -> str:
    """The states of a runner, in their order."""
    return " → ".join(f"{state}{'*' if state in TRANSIENT else ''}" for state in RunnerState) + "\n"


def docstrings(words: type[Enum]) -> dict[str, str]:
    """The string below each member of an enum, which Python itself does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(words))).body
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    found = {}
    for member, below in itertools.pairwise(body):
        match member, below:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
