"""`python -m mlx_runner.download SOURCE MOUNT MEMORY`: verify a model, tell progress and the result on stdout."""

import sys
from pathlib import Path

from . import places, result, verify


def main(source: str, mount: Path, memory: Path) -> int:
    """Verify; the exit code is 0 whenever a result was said."""
    last = -1

    def tell(percent: int) -> None:
        nonlocal last
        if percent != last:
            last = percent
            print(result.encode(result.Percent(percent=percent)), flush=True)

    line: result.Found | result.Refused
    try:
        directory = places.directory(source, mount)
        line = result.Found(facts=verify.verify(directory, places.describe(source), memory, tell))
    except result.ModelError as error:
        line = result.Refused(reason=error.reason, message=error.message)
    print(result.encode(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
