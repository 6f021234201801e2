"""What a rank keeps between its steps. In this process: nothing here needs a group."""

import io
from collections.abc import Sequence
from typing import Any

import pytest

from mlx_operator_api.layers import split
from mlx_runner.engine import imports

from . import architectures

imports.import_all()

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_runner.engine import anatomy, frames, pipeline  # noqa: E402
from mlx_runner.engine.forward import SETTLE_STEPS, Compute, Executor, PipelineStage, WholeModel  # noqa: E402
from mlx_runner.engine.tail import Tail  # noqa: E402

PROMPT = (5, 6, 7)


class Below:
    """The rank below, which takes hidden states."""

    def send(self, hidden: Any) -> None:
        mx.eval(hidden)


def whole(architecture: str) -> Compute:
    model = architectures.build(architecture)
    return WholeModel(model, Tail(model), leader=True)


def stage(architecture: str) -> Compute:
    """The first of four layers."""
    model = architectures.build(architecture)
    parts = split(len(model.layers), len(model.layers))
    found = anatomy.examine(model, parts)
    pipeline.cut(model, found, parts[-1])
    sink: Any = Below()
    return PipelineStage(pipeline.Stage(model, found, parts[-1]), Tail(model), None, sink)


class Traffic:
    """One row decodes all the time, others come and go: the lane is never empty."""

    def __init__(self, compute: Compute) -> None:
        self.executor = Executor(compute)
        self._sequence = 0
        self._run(frames.PrefillBatch((1,), (PROMPT,)), frames.Step((3,)))

    def _run(self, *operations: frames.Operation) -> None:
        self._sequence += 1
        logits = self.executor.run(frames.Frame(0, self._sequence, operations))
        if logits is not None:
            mx.eval(logits)

    def steps(self, count: int) -> None:
        for step in range(count):
            match step % 4:
                case 0:
                    self._run(frames.PrefillBatch((2 + self._sequence,), (PROMPT,)), frames.Step((3, 3)))
                case 3:
                    self._run(frames.Keep((1,)), frames.Step((3,)))
                case _:
                    self._run(frames.Step((3, 3)))

    def pending(self) -> int:
        """Operations that the caches wait for."""
        arrays = [a for layer in self.executor._lanes[0].cache for _, a in tree_flatten(layer.state)]
        return operations([array for array in arrays if isinstance(array, mx.array)])


def operations(arrays: Sequence[Any]) -> int:
    graph = io.StringIO()
    mx.export_to_dot(graph, *arrays)
    return graph.getvalue().count("shape=rectangle")


@pytest.mark.parametrize(("compute", "architecture"), [(whole, "gpt2"), (whole, "smollm3"), (stage, "gemma3_text")])
def test_what_the_caches_wait_for_does_not_grow_with_the_steps(compute: Any, architecture: str) -> None:
    traffic = Traffic(compute(architecture))
    traffic.steps(SETTLE_STEPS)
    few = traffic.pending()
    traffic.steps(4 * SETTLE_STEPS)
    assert traffic.pending() <= few
