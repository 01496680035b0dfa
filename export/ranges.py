"""Fixed ranges for the activations of a captured graph: seen on calibration inputs, cut by an observer, one scale and
zero point for each value, the same for every backend."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from pocketvlm.export.fake_quant import LEVELS, Step
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.observers import BINS, Histogram, Method, range_of
from pocketvlm.export.prepare import LINEARS
from pocketvlm.export.rounding import round_tensor

# XNNPACK's requantization takes no smaller scale
_SMALLEST_SCALE = 2.0**-16
_BATCH = 32


def step_of(low: float, high: float) -> Step:
    """The grid of a range; zero is always on it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / LEVELS, _SMALLEST_SCALE)
    return Step(float(np.float32(scale)), int(np.clip(np.round(-low / scale), 0, LEVELS)))


def reach_of(step: Step) -> tuple[float, float]:
    """The smallest and the largest value on a grid."""
    return -step.zero * step.scale, (LEVELS - step.zero) * step.scale


def steps_by(seen: dict[str, Histogram], method: Method) -> dict[str, Step]:
    """The grid of every activation that was seen."""
    return {name: step_of(*range_of(histogram, method)) for name, histogram in seen.items()}


@torch.no_grad()
def histograms(
    graph_module: fx.GraphModule, rows: NDArray[Any], names: Collection[str], *, ends_only: bool = False
) -> dict[str, Histogram]:
    """What the values of these nodes are over all rows, in two passes: their ends, then their counts.

    ends_only: one pass, counts are zeros; enough for "minmax".
    """
    ends: dict[str, tuple[float, float]] = {}
    counts: dict[str, NDArray[np.int64]] = {}

    class Ends(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n.name in names:
                low, high = (float(end) for end in torch.aminmax(output))
                before = ends.get(n.name, (low, high))
                ends[n.name] = (min(low, before[0]), max(high, before[1]))
            return output

    class Counts(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n.name in names:
                low, high = ends[n.name]
                found = torch.histc(output.float(), BINS, low, high) if high > low else torch.zeros(BINS)
                counts[n.name] = counts.get(n.name, np.zeros(BINS, np.int64)) + found.numpy().astype(np.int64)
            return output

    for interpreter in (Ends,) if ends_only else (Ends, Counts):
        for index in range(0, len(rows), _BATCH):
            # operators that write in place must not reach what was handed in
            interpreter(graph_module).run(torch.from_numpy(rows[index : index + _BATCH].copy()))
    return {name: Histogram(*ends[name], counts.get(name, np.zeros(BINS, np.int64))) for name in ends}


@torch.no_grad()
def output_losses(graph_module: fx.GraphModule, rows: NDArray[Any], steps: dict[str, Step]) -> dict[str, float]:
    """Mean 1 - cosine of the tower's rows where the output of one linear layer is rounded by its step, for each."""
    losses = {}
    exact = run_module(graph_module, rows.copy())
    for node in graph_module.graph.nodes:
        if node.target in LINEARS and node.name in steps:
            found = _OneRounded(graph_module, node, steps[node.name]).run(torch.from_numpy(rows.copy()))
            losses[node.name] = 1.0 - fidelity(found.numpy(), exact).mean
    return losses


class _OneRounded(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, node: fx.Node, step: Step) -> None:
        super().__init__(graph_module)
        self.node, self.step = node, step

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if n is not self.node:
            return output
        low, high = reach_of(self.step)
        return round_tensor(output, torch.tensor(low), torch.tensor(high))
