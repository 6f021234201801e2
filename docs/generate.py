"""Writes everything that is generated: crds/ and its copy in the chart, and the reference parts of docs/.

`python -m docs.generate` writes; with `--check` it only names the files that differ, and fails when there are any.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

from docs import endpoints, faulttable, metrics, pages
from mlx_operator_api import crd

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(?P<begin><!-- generated: (?P<name>[a-z]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_BLOCKS = {
    "transitions": pages.transitions,
    "states": pages.states,
    "ports": pages.ports,
    "changes": pages.changes,
    "models": pages.models,
    "endpoints": endpoints.endpoints,
    "fields": endpoints.fields,
}


def files() -> dict[pathlib.Path, str]:
    """Every generated file with its text."""
    filled_in = [ROOT / "docs" / name for name in ("architecture.md", "models.md", "serving.md")]
    return {
        **{ROOT / directory / crd.FILE: crd.text() for directory in crd.DIRECTORIES},
        ROOT / "docs" / "troubleshooting.md": pages.troubleshooting(),
        ROOT / "docs" / "api.md": pages.api(),
        ROOT / "docs" / "faults.md": faulttable.text(),
        **{page: filled(page.read_text(encoding="utf-8")) for page in filled_in},
        ROOT / "docs" / "metrics.md": metrics.page(),
    }


def filled(text: str) -> str:
    """A page with its marked blocks written anew.

    Raises:
        KeyError: a block has a name that nothing generates.
    """
    return _BLOCK.sub(lambda found: f"{found['begin']}{_BLOCKS[found['name']]()}{found['end']}", text)


def differing() -> list[pathlib.Path]:
    """Files that are not what would be generated."""
    return [file for file, text in files().items() if not file.exists() or file.read_text(encoding="utf-8") != text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m docs.generate`."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description="Write what is generated.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something differs")
    options = parser.parse_args(arguments)
    texts, changed = files(), differing()
    for file in changed:
        if not options.check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(texts[file], encoding="utf-8")
        sys.stdout.write(f"{'differs' if options.check else 'written'}: {file.relative_to(ROOT)}\n")
    if changed and options.check:
        sys.stdout.write("run: make generate\n")
    return 1 if changed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
