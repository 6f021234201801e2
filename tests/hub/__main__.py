"""`python -m tests.hub DIRECTORY [--host H] [--port P]`: serve DIRECTORY/ORG/NAME/… as repositories, until SIGTERM."""

import argparse
import asyncio
import contextlib
import signal
from pathlib import Path

from tests.hub.repository import Repository
from tests.hub.server import Hub, serving


def of(directory: Path) -> Hub:
    """Each ORG/NAME below a directory, with one commit."""
    hub = Hub()
    for path in sorted(p for p in directory.glob("*/*") if p.is_dir()):
        repository = Repository(str(path.relative_to(directory)))
        repository.push(path)
        hub.repositories[repository.name] = repository
    return hub


async def serve(hub: Hub, host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(hub, host, port):
        print(f"serving {', '.join(hub.repositories) or 'nothing'} at {hub.url}", flush=True)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(of(given.directory), given.host, given.port))


if __name__ == "__main__":
    main()
