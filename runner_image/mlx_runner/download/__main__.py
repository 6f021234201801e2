"""`python -m mlx_runner.download REQUEST`: fetch and verify a model; progress and the result on stdout.

REQUEST is a `request.Request` as JSON. The exit code is 0 whenever a result was said.
"""

import os
import sys
import traceback

from mlx_operator_api.conditions import Reason

from . import result
from .request import Request
from .work import work


def main(request: Request) -> int:
    """Do it; a supervisor that is gone ends us."""
    try:
        _say(_work(request))
    except BrokenPipeError:
        # Nobody listens any more; nor may the interpreter try to flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 (told; without a result the supervisor could only guess)
        sys.stderr.write(result.writable(result.public(traceback.format_exc())))
        _say(_bug(error))
    return 0


def _say(line: result.Said) -> None:
    print(result.encode(line), flush=True)


def _work(request: Request) -> result.Found | result.Refused:
    try:
        return work(request, _say)
    except result.ModelError as error:
        return result.Refused(reason=error.reason, message=error.message)


def _bug(error: Exception) -> result.Refused:
    first = str(error).strip().split("\n")[0]
    words = result.public(f"a bug in the download: {type(error).__name__}: {first}")
    return result.Refused(reason=Reason.MODEL_UNREACHABLE, message=result.writable(words))


if __name__ == "__main__":
    sys.exit(main(Request.model_validate_json(sys.argv[1])))
