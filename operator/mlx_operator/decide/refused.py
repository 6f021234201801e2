"""The API server's words about a pod that it refused, with the fields as whoever wrote the ModelInstance knows them."""

import re

from . import template
from .spec import Wanted

_START = r"(?<![\w.])"
_OF_RUNNER = (
    "nodeSelector|affinity|tolerations|topologySpreadConstraints|priorityClassName|runtimeClassName|"
    "serviceAccountName|imagePullSecrets"
)
_ENV = re.compile(_START + r"spec\.containers\[0\]\.env\[(\d+)\]")
_ROWS = (
    # What encoding/json says of a value of another type; its path has neither indices nor an end that we know.
    (re.compile(r"json: cannot unmarshal (\w+) into Go struct field \w+\.(\S+) of type \S+"), r"\2: cannot be a \1"),
    (re.compile(rf"{_START}spec\.({_OF_RUNNER})\b"), r"spec.runner.\1"),
    (re.compile(_START + r"spec\.containers\[0\]\.(resources|image|env)\b"), r"spec.runner.\1"),
    (re.compile(_START + r"spec\.containers\.(resources|env)\b"), r"spec.runner.\1"),
    (re.compile(_START + r"spec\.terminationGracePeriodSeconds\b"), "spec.deadlines.shutdown"),
    (re.compile(_START + r"metadata\.labels\b"), "spec.runner.podLabels"),
    (re.compile(_START + r"metadata\.annotations\b"), "spec.runner.podAnnotations"),
    # What an admission plug-in says names the missing object only.
    (re.compile(r"(?=no PriorityClass with name .* was found)"), "spec.runner.priorityClassName: "),
    (re.compile(r'(?=pod rejected: RuntimeClass "[^"]*" not found)'), "spec.runner.runtimeClassName: "),
    (re.compile(r"(?=error looking up service account )"), "spec.runner.serviceAccountName: "),
)


def in_spec(message: str, wanted: Wanted, rank: int) -> str:
    """A refusal of the pod of a rank, about the fields of the spec that it was made from."""
    message = _ENV.sub(lambda found: template.field_of_variable(wanted, rank, int(found[1])), message)
    for pattern, ours in _ROWS:
        message = pattern.sub(ours, message)
    return message
