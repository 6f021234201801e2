"""Bytes as Kubernetes writes them."""


def quantity(number: int) -> str:
    """`512Mi`, `1.1Gi`."""
    value, units = float(number), ["", "Ki", "Mi", "Gi", "Ti"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{round(value, 1):g}{units[0]}"
