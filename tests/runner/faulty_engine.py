"""The real engine with a fault in it: at a named place it raises, dies, hangs, burns CPU or is slow.

`FAKE_ENGINE_PLAN` names a JSON file that is read each time a place is passed, so that a test can change it; once the
fault was met, `….reached` appears beside it:
`{"at": "connect" | "load" | "read" | "step",
"do": "raise" | "abort" | "segfault" | "exit" | "hang" | "spin" | "gil" | "slow" | "compute" | "disk",
"code": 0, "seconds": 1.0, "fifo": "…"}`.
"""

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_runner.engine import imports, main

_import_all = imports.import_all
_waited: list[str] = []


def _plan() -> dict[str, Any]:
    try:
        return dict(json.loads(Path(os.environ["FAKE_ENGINE_PLAN"]).read_text()))
    except FileNotFoundError:
        return {}


def _misbehave(place: str, plan: dict[str, Any]) -> None:
    match plan["do"]:
        case "raise":
            raise RuntimeError("a fault of this test")
        case "abort":
            sys.stderr.write("terminate called after throwing an instance of 'a fault of this test'\n")
            sys.stderr.flush()
            os.abort()
        case "segfault":
            ctypes.string_at(0)
        case "exit":
            os._exit(plan["code"])
        case "hang":
            threading.Event().wait()
        case "spin":
            while True:
                pass
        case "gil":
            ctypes.PyDLL(None).pause()  # unlike CDLL, it keeps the interpreter's lock
        case "slow":
            time.sleep(plan["seconds"])
        case "compute":
            end = time.process_time() + plan["seconds"]
            while time.process_time() < end:
                pass
        case "disk" if not _waited:
            # Until its child has opened the FIFO, the kernel keeps the parent of a posix_spawn in state D.
            _waited.append(place)
            os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, plan["fifo"], 0, 0)])


def _wrap(owner: Any, name: str, place: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def passing(*arguments: Any, **options: Any) -> Any:
        plan = _plan()
        if plan.get("at") == place:
            Path(f"{os.environ['FAKE_ENGINE_PLAN']}.reached").touch()
            _misbehave(place, plan)
        return original(*arguments, **options)

    setattr(owner, name, passing)


def import_all() -> None:
    _import_all()
    import mlx.core as mx

    from mlx_runner.engine import forward, serving

    _wrap(serving, "connect", "connect")
    _wrap(serving, "load", "load")
    _wrap(mx, "eval", "read")
    _wrap(forward.Executor, "run", "step")


if __name__ == "__main__":
    imports.import_all = import_all
    main.main()
