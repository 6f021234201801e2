"""One API server, one operator and one campaign for all tests of this folder."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.apiserver.harness import install, kubectl, world
from tests.cluster.apiserver import ApiServer
from tests.cluster.waiting import tell
from tests.mutation.campaign import Campaign, Outcome
from tests.mutation.kubelet import TellingKubelet
from tests.mutation.mutations import MUTATIONS, Mutation
from tests.mutation.values import ACCOUNT, PRIORITY, RUNTIME

NAMESPACE = "mutation"
_SUMMARY = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server with the CRD, the chart, and what the good spec refers to."""
    folder = tmp_path_factory.mktemp("apiserver")
    with ApiServer(folder, controllers=False, progress=tell) as bare:
        install(bare)
        kubectl(bare, "apply", "-f", "-", stdin=yaml.safe_dump_all(_referred()))
        with ApiServer(folder, progress=tell) as server:
            yield server


def _referred() -> list[dict[str, object]]:
    return [
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": PRIORITY},
            "value": 1000,
        },
        {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": RUNTIME},
            "handler": "runsc",
        },
    ]


@pytest.fixture(scope="session")
def outcomes(
    server: ApiServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Outcome]:
    """What became of every mutation that was chosen to be tested, by its name."""
    wanted = {_mutation(item) for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())}
    # A test of no mutation in particular is about all of them.
    chosen = [mutation for mutation in MUTATIONS if None in wanted or mutation.name in wanted]
    began = time.monotonic()
    found = asyncio.run(_all(server, tmp_path_factory.mktemp("world"), chosen))
    refused = sum(outcome.refused is not None for outcome in found.values())
    request.config.stash[_SUMMARY] = (
        f"{len(found)} mutations: {refused} refused by the API server, {len(found) - refused} run, "
        f"in {time.monotonic() - began:.0f} s"
    )
    return found


def _mutation(item: pytest.Item) -> str | None:
    """The name of the mutation that a test is about."""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    mutation = parameters.get("mutation")
    return mutation.name if isinstance(mutation, Mutation) else None


async def _all(server: ApiServer, folder: Path, chosen: list[Mutation]) -> dict[str, Outcome]:
    async with world(server, NAMESPACE, folder, TellingKubelet) as place:
        kubectl(server, "create", "serviceaccount", ACCOUNT, f"--namespace={NAMESPACE}")
        await place.operator()
        return await Campaign(place).run(chosen)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how much was tried."""
    if (line := config.stash.get(_SUMMARY, None)) is not None:
        terminalreporter.write_line(line)
