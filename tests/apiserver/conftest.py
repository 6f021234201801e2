"""The API server that the operator's tests share, and a world for each of them."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.apiserver.harness import World, install, world
from tests.cluster.apiserver import ApiServer
from tests.cluster.waiting import tell


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One for all tests, which run one after the other; a test that stops it starts it again.

    The controllers start after the CRD is there: the garbage collector learns of a new kind only every 30 s.
    """
    folder = tmp_path_factory.mktemp("apiserver")
    with ApiServer(folder, controllers=False, progress=tell) as bare:
        install(bare)
        with ApiServer(folder, progress=tell) as server:
            yield server


@pytest_asyncio.fixture
async def place(api_server: ApiServer, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """A namespace of its own with a kubelet; no operator yet."""
    namespace = f"t{abs(hash(request.node.nodeid)) % 10**10}"
    async with world(api_server, namespace, tmp_path) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def operated(
    api_server: ApiServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[World]:
    """A namespace with a kubelet and one operator, for all tests of a module."""
    namespace = f"m{abs(hash(request.node.nodeid)) % 10**10}"
    async with world(api_server, namespace, tmp_path_factory.mktemp("operated")) as made:
        await made.operator()
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def shared(operated: World) -> AsyncIterator[World]:
    """The module's namespace, with no instance and no fault in it."""
    operated.kubelet.plan()
    yield operated
    operated.kubelet.held.clear()
    await operated.clear()
