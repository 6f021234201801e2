"""One cluster for all tests of this folder; a namespace and instances for each test."""

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster import binaries, images
from tests.cluster.cluster import Cluster
from tests.node.chat import Questions
from tests.node.instance import Instance, manifest
from tests.node.testbed import MODEL_IMAGE, Testbed, answers_of_one_process

KEEP = "MLX_OPERATOR_KEEP_CLUSTER"
"""Set it to look at the cluster after the tests; a later run uses it again."""
_numbers = itertools.count(1)


def say(text: str) -> None:
    """Progress of the set-up, which takes more than 5 s."""
    print(text, file=sys.__stderr__, flush=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Testbed]:
    """Two nodes, all images on them, both charts installed."""
    programs = binaries.ensure(say)
    model, model_image = images.ensure_demo_model(say)
    archives = [images.ensure_operator(say), images.ensure_runner(say), model_image]
    nodes = Cluster(name="test", nodes=2, progress=say)
    if not os.environ.get(KEEP):
        nodes.down()  # what a run that was killed has left: its instances, a node that it had cut off
    nodes.up()
    try:
        say("loading images")
        for archive in archives:
            nodes.load_image(archive)
        testbed = Testbed(nodes, programs, model)
        say("installing the charts")
        testbed.helm.install_crds()
        testbed.install_operator()
        yield testbed
        refused = [(r.verb, r.resource, r.namespace) for r in testbed.refused()]
        assert not refused, f"the chart's RBAC lacks what the operator asks for: {refused[:5]}"
    finally:
        if not os.environ.get(KEEP):
            nodes.down()


@pytest.fixture(scope="session")
def questions(cluster: Testbed) -> Questions:
    """The trained questions with the answers of one plain mlx-lm process."""
    return answers_of_one_process(cluster.model)


@pytest.fixture
def namespace(cluster: Testbed, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace under PodSecurity `restricted`."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))
    with cluster.kubectl.namespace(f"t{next(_numbers)}-{words}"[:50].strip("-")) as name:
        yield name


@pytest.fixture
def create(cluster: Testbed, namespace: str) -> Iterator[Callable[..., Instance]]:
    """`create(name, source=…, **spec)`: apply a ModelInstance; all are deleted after the test."""
    made: list[Instance] = []

    def make(name: str, source: str = f"oci://{MODEL_IMAGE}", **spec: Any) -> Instance:
        cluster.kubectl.apply(manifest(name, source, **spec), namespace)
        made.append(Instance(cluster.kubectl, namespace, name))
        return made[-1]

    yield make
    for instance in made:
        instance.kubectl.run(
            "delete", "mi", instance.name, "-n", namespace, "--ignore-not-found", "--wait=false", check=False
        )
