"""Small files that several processes write."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Replace a small file as a whole, whoever else does the same."""
    fresh = path.with_name(f"{path.name}.{os.urandom(4).hex()}.new")
    try:
        fresh.write_text(text)
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
