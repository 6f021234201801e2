"""The process: configuration, servers, signals."""

import asyncio
import logging
import os
import signal
import sys
from contextlib import AsyncExitStack

from . import children, config
from .config import Config, ConfigError
from .control import Control
from .http import serving
from .metrics import Metrics
from .openai_api import PublicApi
from .supervisor import Supervisor

log = logging.getLogger(__name__)

EXIT_CONFIGURATION = 2
EXIT_ADDRESS = 3


async def run(settings: Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if os.getpid() == 1:
        children.watch_orphans(loop)
    supervisor = Supervisor(settings)
    metrics = Metrics(supervisor)
    control = Control(supervisor, metrics)
    async with AsyncExitStack() as servers:
        try:
            await servers.enter_async_context(serving(control.app(), settings.listen_host, settings.control_port))
            if settings.rank == 0:
                await servers.enter_async_context(
                    serving(PublicApi(supervisor, metrics).app(), settings.listen_host, settings.public_port)
                )
        except OSError as error:
            log.critical("cannot listen: %s: another process uses the port, or the address is not this host's", error)
            return EXIT_ADDRESS
        supervisor.start()
        log.info(
            "supervisor of rank %d of %s/%s pod=%s node=%s serves on %s",
            settings.rank,
            settings.namespace,
            settings.instance,
            settings.pod_name,
            settings.node_name,
            settings.listen_host,
        )
        await stop.wait()
        await supervisor.drain()
        control.close()
    return 0


def main() -> int:
    """Entry point of `python -m mlx_runner`."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    try:
        settings = config.from_environment()
    except ConfigError as error:
        sys.stderr.write(f"mlx-runner: {error}\n")
        return EXIT_CONFIGURATION
    return asyncio.run(run(settings))
