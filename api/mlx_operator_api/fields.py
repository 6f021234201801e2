"""Field types of the spec, each with the rule and the words that the API server answers a bad value with.

Rules stand on the smallest node: a stored object that breaks a rule of a later release can still be changed elsewhere.
Structural limits (type, enum, range, required) suppress every CEL rule of the object, so what users get wrong most is
said in CEL.
"""

from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from .cel import cel, rules, text_rule
from .schema import INT_OR_STRING, PRESERVE
from .source import SCHEMES

# At most two components of hours fit, so that CEL's own duration() (64 bits of nanoseconds) never overflows.
DURATION_MAX_LENGTH = 16
DURATION_RULE = "^([0-9]{1,6}(ms|s|m|h))+$"
_DURATION_HELP = "write a number with a unit (ms, s, m, h), for example 90s or 10m"

Duration = Annotated[
    str,
    Field(
        max_length=DURATION_MAX_LENGTH,
        json_schema_extra=rules(
            text_rule(f"self.matches('{DURATION_RULE}')", f"is no duration: {_DURATION_HELP}"),
            text_rule(
                f"!self.matches('{DURATION_RULE}') || self.matches('[1-9]')",
                "is no time at all: write a duration above zero, for example 30s",
            ),
        ),
    ),
]
# Not by CEL's own quantity(): of an exponent of nine digits it writes out every zero, and the API server with it.
_NUMBER = "([0-9]{1,18}([.][0-9]{0,18})?|[.][0-9]{1,18})"
_QUANTITY = f"^[+]?{_NUMBER}([eE][-+]?(1[0-8]|[0-9])|[numkMGTPE]|[KMGTPE]i)?$"
Quantity = Annotated[
    str | int,
    WithJsonSchema(
        {
            INT_OR_STRING: True,
            "maxLength": 64,
            **cel(
                rule=f"type(self) == int ? self >= 0 : self.matches('{_QUANTITY}')",
                message="no quantity: write a number of zero or more, at most 18 digits, with an optional unit, for "
                "example 500m, 2 or 4Gi",
            ),
        }
    ),
]
Opaque = Annotated[dict[str, Any], WithJsonSchema({"type": "object", PRESERVE: True})]

_PART = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = f"{_PART}([.]{_PART})*"
_OBJECT_NAME = f"^{_SUBDOMAIN}$"
Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        json_schema_extra=text_rule(
            f"self.matches('{_OBJECT_NAME}')",
            "is no name of a Kubernetes object: use lower-case letters and digits, with - and . between them",
        ),
    ),
]
Image = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=text_rule(
            "self.matches('^[A-Za-z0-9][-A-Za-z0-9._:/@]*$')",
            "is no image: write REGISTRY/NAME:TAG or REGISTRY/NAME@DIGEST",
        ),
    ),
]
_SOURCE_RULES = (
    text_rule("self.matches('^(hf|pvc|oci)://')", f"is no model source: use {SCHEMES}"),
    text_rule(
        "!self.startsWith('hf://') || self.matches('^hf://[-A-Za-z0-9._]+/[-A-Za-z0-9._]+(@[-A-Za-z0-9._/]+)?$')",
        "names no repository: write hf://ORG/NAME or hf://ORG/NAME@REV",
    ),
    text_rule(
        "!self.startsWith('pvc://') || self.matches('^pvc://" + _SUBDOMAIN + "(/.*)?$')",
        "names no claim: write pvc://CLAIM or pvc://CLAIM/PATH, with the name of a PersistentVolumeClaim",
    ),
    text_rule(
        "!self.startsWith('pvc://') || !self.matches('/[.][.](/|$)')",
        "leads out of the volume: write the path inside the claim without ..",
    ),
    text_rule(
        "!self.startsWith('oci://') || self.matches('^oci://[A-Za-z0-9][-A-Za-z0-9._:/@]*$')",
        "names no image: write oci://REGISTRY/NAME:TAG or oci://REGISTRY/NAME@DIGEST",
    ),
)
ModelSource = Annotated[str, Field(max_length=2048, json_schema_extra=rules(*_SOURCE_RULES))]
"""Of the files of a model or an adapter."""
SecretKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        json_schema_extra=text_rule(
            "self.matches('^[-._a-zA-Z0-9]+$')", "is no key of a Secret: use letters, digits, -, _ and ."
        ),
    ),
]
ServedName = Annotated[
    str,
    Field(
        max_length=253,
        json_schema_extra=text_rule(
            "self.matches('^[A-Za-z0-9][-A-Za-z0-9._:/@+]*$')",
            "cannot be sent as a model name: start with a letter or digit, then letters, digits and . _ : / @ + -",
        ),
    ),
]

_QUALIFIED = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL_KEY = f"^({_SUBDOMAIN}/)?{_QUALIFIED}$"
ANNOTATION_KEY = f"^({_SUBDOMAIN.replace('a-z0-9', 'A-Za-z0-9')}/)?{_QUALIFIED}$"
DEVICE = f"^{_SUBDOMAIN}/{_QUALIFIED}$"
"""An extended resource, such as nvidia.com/gpu."""
KEY_HELP = "use letters, digits, -, _ and ., a letter or digit at its ends, and a domain and / before it if need be"
TaintKey = Annotated[
    str,
    Field(
        min_length=1,
        max_length=317,
        json_schema_extra=text_rule(f"self.matches('{LABEL_KEY}')", f"is no key of a taint: {KEY_HELP}"),
    ),
]
LABEL_VALUE = "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
LabelValue = Annotated[
    str,
    Field(
        max_length=63,
        json_schema_extra=text_rule(
            f"self.matches('{LABEL_VALUE}')",
            "is no label value: use letters, digits, -, _ and . and start and end with a letter or digit",
        ),
    ),
]
AnnotationValue = Annotated[str, Field(max_length=65536)]

RESERVED_ENV_PREFIXES = ("MLX_RUNNER_", "MLX_INSTANCE_")
"""Environment variables that the operator sets itself."""
EnvName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        json_schema_extra=rules(
            text_rule(
                "self.matches('^[-._A-Za-z][-._A-Za-z0-9]*$')",
                "is no name of an environment variable: use letters, digits, _, - and . and no digit first",
            ),
            text_rule(
                " && ".join(f"!self.startsWith('{prefix}')" for prefix in RESERVED_ENV_PREFIXES),
                "is reserved: the operator sets " + " and ".join(f"{p}*" for p in RESERVED_ENV_PREFIXES) + " itself",
            ),
        ),
    ),
]
