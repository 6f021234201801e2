"""`python -m mlx_runner.download REQUEST`: fetch and verify a model; progress and the result on stdout.

REQUEST is a `request.Request` as JSON. The exit code is 0 whenever a result was said.
"""

import os
import sys
from pathlib import Path

from mlx_operator_api.source import SourceKind
from mlx_operator_api.tasks import ModelFacts

from . import places, result, verify
from .report import Progress
from .request import Request


def main(request: Request) -> int:
    """Do it; a supervisor that is gone ends us."""
    try:
        _say(_work(request))
    except BrokenPipeError:
        # Nobody listens any more; nor may the interpreter try to flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _say(line: result.Said) -> None:
    print(result.encode(line), flush=True)


def _work(request: Request) -> result.Found | result.Refused:
    try:
        path, facts = _model(request)
    except result.ModelError as error:
        return result.Refused(reason=error.reason, message=error.message)
    return result.Found(facts=facts, path=path)


def _model(request: Request) -> tuple[Path, ModelFacts]:
    source = places.parsed(request.source)
    if source.kind is SourceKind.HUB:
        # Only here: what is mounted needs no HTTP client.
        from . import hub

        return hub.fetch(request, source, _say)
    path = places.directory(source, request.model_dir)
    return path, verify.verify(path, places.describe(source), request, Progress(_say))


if __name__ == "__main__":
    sys.exit(main(Request.model_validate_json(sys.argv[1])))
