"""MLX and mlx-lm, imported the way a runner needs them: offline, quiet, and without their side effects."""

import codecs
import os
import resource
import threading
import warnings
from pathlib import Path

_ENVIRONMENT = {
    # A path that does not exist would otherwise become a look-up at a model hub.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_LOWEST = 19


def import_quietly() -> None:
    """The same while another engine serves: at the lowest priority, and that only until it is done.

    A process may not raise its priority again, but a thread that is over has none: it imports, and this one stays as
    it is. MLX itself (20 ms) is imported here, because its thread for computing comes with it.
    """
    import mlx.core  # noqa: F401

    def quietly() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
        import_all()

    thread = threading.Thread(target=quietly, name="imports")
    thread.start()
    thread.join()


def import_all() -> None:
    """Import what the engine uses (about a second)."""
    os.environ.update(_ENVIRONMENT)
    warnings.filterwarnings("ignore", module="transformers")
    original = resource.setrlimit
    # mlx-lm lowers the limit of open files at import, for good; where the hard limit is already lower it even fails.
    resource.setrlimit = lambda *_: None
    try:
        import mlx_lm.generate
        import mlx_lm.utils  # noqa: F401

        from . import serving  # noqa: F401 (and with it every module of the engine)

        codecs.lookup("idna")  # which Python would only read at the first connection
    finally:
        resource.setrlimit = original


def device() -> str:
    """`cpu` or `gpu`: where MLX computes by default."""
    import mlx.core as mx

    return "gpu" if mx.default_device().type == mx.gpu else "cpu"


def blas(maps: Path = Path("/proc/self/maps")) -> str:
    """Which BLAS this process has mapped first: `openblas`, or the reference one that is `bundled` with the wheel."""
    return "openblas" if "libopenblas" in maps.read_text() else "bundled"
