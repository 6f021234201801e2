"""Prints what an extra of this project needs, one requirement a line, for the dependency layers of the Dockerfiles.

A Dockerfile that installed the project itself would reinstall everything after each change of its code.
"""

import pathlib
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping

USAGE = "usage: requirements.py PYPROJECT EXTRA [EXTRA...]"


def requirements_of(pyproject: str, extras: Iterable[str]) -> list[str]:
    """The requirements of a project with some of its extras, sorted, each once.

    Args:
        pyproject: the text of a pyproject.toml.
        extras: names under [project.optional-dependencies]; an extra that names the project itself is followed.

    Raises:
        ValueError: the project has no such extra.
    """
    project = tomllib.loads(pyproject)["project"]
    offered: Mapping[str, list[str]] = project.get("optional-dependencies", {})
    found = set(project.get("dependencies", []))
    for extra in extras:
        found.update(_of_extra(project["name"], offered, extra))
    return sorted(found)


def _of_extra(name: str, offered: Mapping[str, list[str]], extra: str) -> Iterator[str]:
    if extra not in offered:
        raise ValueError(f"extra {extra!r} is not in pyproject.toml: choose from {', '.join(sorted(offered))}")
    for requirement in offered[extra]:
        own = re.fullmatch(rf"{re.escape(name)}\[([^\]]*)\]", requirement)
        if own is None:
            yield requirement
            continue
        for other in own.group(1).split(","):
            yield from _of_extra(name, offered, other.strip())


def main(arguments: list[str]) -> int:
    """The command line; the exit code is 2 for a bad one."""
    if len(arguments) < 2:
        sys.stderr.write(f"{USAGE}\n")
        return 2
    path, *extras = arguments
    try:
        lines = requirements_of(pathlib.Path(path).read_text(encoding="utf-8"), extras)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
