"""Bring images into nodes: only the blobs that a node lacks travel, all nodes at the same time."""

import concurrent.futures
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.archive import Archive, Image
from tests.cluster.errors import ClusterError
from tests.cluster.network import run_command
from tests.cluster.node import Node
from tests.cluster.waiting import Progress

_SECONDS = 600.0


def load_archives(nodes: Sequence[Node], archives: Sequence[Path], progress: Progress) -> None:
    """Import the images of several archives into several nodes.

    Args:
        nodes: running nodes.
        archives: layout folders, OCI archives or docker-archives.
        progress: told what was loaded, and every 5 s that it goes on.

    Raises:
        ClusterError: an archive cannot be read, or a node refused it.
    """
    opened = [Archive(path) for path in archives]
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, len(nodes))) as pool:
        waiting = {pool.submit(_load, node, opened, progress) for node in nodes}
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, timeout=5)
            for future in done:
                future.result()
            if waiting and not done:
                progress(f"still loading images ({time.monotonic() - begun:.0f} s)")


def _load(node: Node, archives: Sequence[Archive], progress: Progress) -> None:
    for archive in archives:
        begun = time.monotonic()
        known = _known_images(node)
        if all(known.get(image.name) == image.descriptor["digest"] for image in archive.images):
            continue
        size = _import(node, archive, _present(node))
        names = ", ".join(image.name for image in archive.images)
        progress(f"{names} is on {node.name}: {size / 2**20:.1f} MiB in {time.monotonic() - begun:.1f} s")


def _import(node: Node, archive: Archive, present: set[str]) -> int:
    # A manifest that is there may have lost its label for lack of an image: always send what is small.
    small = {digest for image in archive.images for digest in _small(image)}
    command = node.ctr("images", "import", "--snapshotter", node.snapshotter, "-")
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    watchdog = threading.Timer(_SECONDS, process.kill)
    watchdog.start()
    try:
        if process.stdin is None or process.stderr is None:
            raise RuntimeError("the pipes that were asked for are missing")
        try:
            size = archive.write_thin(process.stdin, present - small)
            process.stdin.close()
        except BrokenPipeError:
            size = 0
        said = process.stderr.read().decode(errors="replace").strip()
        if process.wait(timeout=_SECONDS):
            raise ClusterError(f"{node.name} refused the images of {archive.path}: {said[-800:]}")
        return size
    finally:
        watchdog.cancel()
        process.kill()
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    process.wait(timeout=10)
    for pipe in (process.stdin, process.stderr):
        if pipe is not None and not pipe.closed:
            try:
                pipe.close()
            except BrokenPipeError:
                continue


def _small(image: Image) -> set[str]:
    return set(image.blobs) - set(image.layers)


def _present(node: Node) -> set[str]:
    return set(run_command(node.ctr("content", "ls", "-q")).split())


def _known_images(node: Node) -> dict[str, str]:
    """Return {name: digest} of the images that a node can run."""
    lines = run_command(node.ctr("images", "ls")).splitlines()[1:]
    return {words[0]: words[2] for line in lines if len(words := line.split()) > 2}
