"""Weights of Core ML packages in 8 bits or as tables of a few values, rounded here so that they are known exactly.

The weights are rounded in the graph, biases corrected for it, and coremltools then only stores what it finds: the
result can be judged in eager mode, where the packages themselves run on macOS only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.graphs import block_name, constant, in_float, inside, mark_float, prune, set_parameter
from pocketvlm.export.prepare import (
    FLOAT_WEIGHT,
    Prepared,
    Rounding,
    balance_linears,
    capture,
    correct_bias,
    fold_batchnorm,
    mean_outputs,
    round_weights,
)
from pocketvlm.export.rounding import round_weight

# coremltools leaves constants of fewer elements as they are
SMALLEST = 2048
PALETTE_BITS = {"palette8": 8, "palette6": 6, "palette4": 4}
_PER_CHANNEL = ("w8", "mixed", "w8a8-static")
_LLOYD_STEPS = 60
_BINS = 512


def palettize(weight: Tensor, bits: int) -> Tensor:
    """The values that a weight takes when it may hold 2^bits different ones: k-means in one dimension (Lloyd's
    algorithm), over the float16 values that would otherwise be stored."""
    half = weight.detach().cpu().to(torch.float16).numpy().astype(np.float64)
    values, inverse, counts = np.unique(half, return_inverse=True, return_counts=True)
    count = 2**bits
    if len(values) <= count:
        return torch.from_numpy(values[inverse].reshape(half.shape)).to(weight.dtype)
    mass, moment = np.cumsum(counts), np.cumsum(counts * values)
    # the best places are as dense as the cube root of the values' density (Panter and Dite 1951); even quantiles leave
    # too few for the tails, and Lloyd's steps move them there too slowly
    density, edges = np.histogram(values, _BINS, weights=counts)
    share = np.cumsum(np.cbrt(density))
    centres = np.unique(np.interp((np.arange(count) + 0.5) / count * share[-1], share, edges[1:]))
    for _ in range(_LLOYD_STEPS):
        ends = np.append(np.searchsorted(values, (centres[1:] + centres[:-1]) / 2), len(values))
        starts = np.insert(ends[:-1], 0, 0)
        ends, starts = ends[ends > starts], starts[ends > starts]
        before = np.where(starts > 0, mass[starts - 1], 0), np.where(starts > 0, moment[starts - 1], 0.0)
        updated = (moment[ends - 1] - before[1]) / (mass[ends - 1] - before[0])
        if len(updated) == len(centres) and np.array_equal(updated, centres):
            break
        centres = updated
    centres = centres.astype(np.float16).astype(np.float64)
    nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]
    return torch.from_numpy(nearest[inverse].reshape(half.shape)).to(weight.dtype)


@torch.no_grad()
def compressed_graph(
    module: nn.Module, ready: Prepared | None, rows: NDArray[Any], precision: str, blocks: Collection[str] = ()
) -> tuple[fx.GraphModule, dict[str, object]]:
    """The tower with rounded weights (linear layers, convolutions, token tables), biases corrected, and notes.

    ready: where there are calibration inputs; without them biases stay. rows: example inputs, for tracing. blocks: of
    the tower that stay in float16.
    """
    values: Callable[[Tensor], Tensor] = round_weight
    if precision in PALETTE_BITS:
        values = partial(palettize, bits=PALETTE_BITS[precision])
    rounded = copy.deepcopy(module)
    for path, child in rounded.named_modules():
        table = isinstance(child, nn.Embedding) and child.weight.numel() >= SMALLEST
        if table and not inside(block_name(path), blocks):
            child.weight.data.copy_(values(child.weight.data))
    graph = capture(rounded, ready.fit if ready else rows)
    mark_float(graph, blocks)
    fold_batchnorm(graph)
    active = precision == "w8a8-static"
    rounding = Rounding(values, "fixed" if active else "none", values, SMALLEST)
    if ready:
        if active:
            balance_linears(graph, ready.fit)
        exact = capture(module, ready.fit)
        fold_batchnorm(exact)
        correct_bias(graph, ready.fit, 0, rounding, mean_outputs(exact, ready.fit))
    round_weights(graph, rounding)
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.embedding.default and in_float(node):
            set_parameter(graph, node, 0, cast(Tensor, constant(graph, node.args[0])), FLOAT_WEIGHT)
    prune(graph)
    notes: dict[str, object] = {
        "scheme": "weights-per-channel"
        if precision in _PER_CHANNEL
        else f"{2 ** PALETTE_BITS[precision]}-values-per-tensor",
        "biases": "corrected" if ready else "as they were, for want of calibration data",
    }
    if ready:
        notes |= fidelity(run_module(graph, ready.held), ready.expected).notes(precision)
        notes["held_out_by"] = "the rounded weights in eager float32"
    return graph, notes


def traceable(graph: fx.GraphModule) -> fx.GraphModule:
    """Without its checks of the inputs' shapes and types: they cannot be traced, and Core ML's pixels come as float."""
    graph._forward_pre_hooks.clear()
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def store_compressed(model: Any, precision: str) -> Any:
    """Let coremltools store the rounded weights of a converted model in as many bits as they need."""
    import coremltools.optimize.coreml as cto

    if precision in _PER_CHANNEL:
        linear = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
        kept = dict.fromkeys(
            n for n in cto.get_weights_metadata(model, weight_threshold=SMALLEST - 1) if FLOAT_WEIGHT in n
        )
        return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=linear, op_name_configs=kept))
    bits = PALETTE_BITS[precision]
    # not coremltools' mode "unique": it sorts float16 values, and numpy 2.3.5 left some out of order on the processor
    # that this was written on, so that equal values were counted twice and more bits were spent
    table = cto.OpPalettizerConfig(mode="custom", lut_function=partial(_table, bits=bits))
    weights = cto.get_weights_metadata(model, weight_threshold=SMALLEST - 1)
    rounded = [name for name, weight in weights.items() if len(_distinct(weight.val)[0]) <= 2**bits]
    return cto.palettize_weights(model, cto.OptimizationConfig(op_name_configs=dict.fromkeys(rounded, table)))


def _distinct(value: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return np.unique(np.asarray(value, np.float32), return_inverse=True)


def _table(value: NDArray[Any], bits: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """A tensor as a table of its values and places in it."""
    values, places = _distinct(value)
    table = np.zeros(2**bits, value.dtype)
    table[: len(values)] = values
    return table, places.ravel().astype(np.uint8)
