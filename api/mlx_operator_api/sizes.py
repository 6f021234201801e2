"""Sizes in bytes: as people read them, and as Kubernetes writes them."""

import math
import re
from decimal import Decimal

_QUANTITY = re.compile(r"([+-]?[0-9]*\.?[0-9]+|[+-]?[0-9]+\.)(?:([eE][+-]?[0-9]{1,3})|([numkMGTPE]|[KMGTPE]i)?)")
_UNITS = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(10**3), "M": Decimal(10**6),
    "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15), "E": Decimal(10**18),
    **{f"{unit}i": Decimal(1024 ** (power + 1)) for power, unit in enumerate("KMGTPE")},
}  # fmt: skip

_MAX_DIGITS = 40
"""A larger number is no size of anything, and its digits alone could fill the memory."""


def human_size(size: int) -> str:
    """`3.4 MB`, `1.2 GB`: as hubs print it, in powers of 1000."""
    value, units = float(size), ("B", "kB", "MB", "GB", "TB")
    for unit in units[:-1]:
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {units[-1]}"


def quantity(text: str | int) -> int:
    """Bytes of a Kubernetes quantity such as `20Gi`, `1.5G` or `1e9`; fractions are rounded up.

    Raises:
        ValueError: the text is no quantity.
    """
    found = _QUANTITY.fullmatch(str(text))
    if found is None:
        raise ValueError(f"{text!r} is no quantity: write a number with an optional unit, for example 500M or 20Gi")
    number, exponent, unit = found.groups()
    value = Decimal(number + (exponent or ""))
    if value.adjusted() >= _MAX_DIGITS:
        raise ValueError(f"{text!r} is more than any machine has: write a smaller number, for example 500M or 20Gi")
    return math.ceil(value * _UNITS.get(unit or "", Decimal(1)))
