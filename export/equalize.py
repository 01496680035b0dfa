"""Cross-layer equalisation: channels of an activation, which share one range, made equally loud without changing what
the tower computes.

A channel of what one convolution gives may be divided by s_j > 0 if every convolution that reads it has its weights
for that channel multiplied by s_j; a ReLU, a sum and a spatial mean in between let the factor pass (Nagel et al. 2019,
"Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1; there for pairs of layers and
from their weights, here for everything that a residual stream ties together and from the activations seen). ReLU6 does
not let a factor pass, so behind one nothing is changed.

The trade is that of SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, equation 4): s_j = max|x_j|^a / max|W_:j|^(1-a). A
depthwise convolution has one scale per channel and takes any factor for free: where only such read a value, a is 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pocketvlm.export.graphs import constant, set_parameter
from pocketvlm.export.prepare import CONVOLUTIONS
from pocketvlm.export.rounding import not_quiet

_aten = torch.ops.aten
_UNARY = (
    *(_aten.relu.default, _aten.relu_.default, _aten.clone.default, _aten.dropout.default),
    *(_aten.adaptive_avg_pool2d.default, _aten.avg_pool2d.default, _aten.max_pool2d.default, _aten.mean.dim),
)
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_BATCH = 32


@dataclass
class Tied:
    """Values that share their channels' factors. producers: convolutions that give them. consumers: those that read
    them. values: all nodes whose channels are scaled."""

    producers: list[fx.Node] = field(default_factory=list)
    consumers: list[fx.Node] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)


def tied_values(graph_module: fx.GraphModule) -> list[Tied]:
    """The groups of values whose channels can be scaled without changing what the graph computes."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            node = parent[node]
        return node

    nodes = list(graph_module.graph.nodes)
    for node in nodes:
        for source in _passed(node):
            parent[root(node)] = root(source)
    groups: dict[fx.Node, Tied] = defaultdict(Tied)
    broken = set()
    for node in nodes:
        if node.op == "call_function" and (node in parent or _scalable(graph_module, node)):
            group = groups[root(node)]
            group.values.append(node)
            if not _passed(node):
                group.producers.append(node)
                broken |= set() if _scalable(graph_module, node) else {root(node)}
            for user in node.users:
                if node in _passed(user):
                    continue
                if _reads_channels(graph_module, user, node):
                    group.consumers.append(user)
                else:
                    broken.add(root(node))
    return [group for key, group in groups.items() if key not in broken and group.producers and group.consumers]


@torch.no_grad()
def loudness(graph_module: fx.GraphModule, rows: NDArray[Any], groups: Iterable[Tied]) -> dict[str, Tensor]:
    """The largest magnitude of every channel of these groups' values, by the node's name."""
    names = {node.name for group in groups for node in group.values}
    found: dict[str, Tensor] = {}

    class Seen(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n.name in names:
                loudest = output.abs().amax(dim=[axis for axis in range(output.ndim) if axis != 1])
                found[n.name] = torch.maximum(found.get(n.name, loudest), loudest)
            return output

    for index in range(0, len(rows), _BATCH):
        Seen(graph_module).run(torch.from_numpy(rows[index : index + _BATCH].copy()))
    return found


@torch.no_grad()
def equalize(graph_module: fx.GraphModule, seen: dict[str, Tensor], alpha: float) -> int:
    """Scale the channels of every group, in place. seen: of `loudness`. alpha: how much of the difference between
    channels goes into the weights behind them, 0 to 1.

    Returns:
        The number of groups.
    """
    groups = tied_values(graph_module)
    for group in groups:
        loud = not_quiet(torch.stack([seen[node.name] for node in group.values]).amax(dim=0))
        dense = [node for node in group.consumers if not _is_depthwise(graph_module, node)]
        scale = loud
        if dense:
            reach = torch.stack(
                [_weight(graph_module, node).abs().transpose(0, 1).flatten(1).amax(1) for node in dense]
            )
            scale = loud**alpha / not_quiet(reach.amax(dim=0)) ** (1 - alpha)
        # only ratios matter; this leaves the loudest value as loud as it was
        scale = scale * ((loud / scale).max() / loud.max())
        for node in group.producers:
            shape = (-1, *[1] * (_weight(graph_module, node).ndim - 1))
            set_parameter(graph_module, node, 1, _weight(graph_module, node) / scale.reshape(shape), "equal_weight")
            bias = constant(graph_module, node.args[2]) if len(node.args) > 2 else None
            if bias is not None:
                set_parameter(graph_module, node, 2, bias / scale, "equal_bias")
        for node in group.consumers:
            weight = _weight(graph_module, node)
            axis = 0 if _is_depthwise(graph_module, node) else 1
            shape = tuple(-1 if at == axis else 1 for at in range(weight.ndim))
            set_parameter(graph_module, node, 1, weight * scale.reshape(shape), "taking_weight")
    return len(groups)


def _passed(node: fx.Node) -> list[fx.Node]:
    """The arguments whose channels' factors reach this node's value unchanged."""
    if node.target in _UNARY:
        return [node.args[0]]  # type: ignore[list-item]
    terms = [argument for argument in node.args if isinstance(argument, fx.Node) and argument.op == "call_function"]
    if node.target in _SUMS and len(terms) == 2 and all(_channels(term) > 1 for term in terms):
        return terms
    return []


def _channels(node: fx.Node) -> int:
    value = node.meta.get("val")
    return int(value.shape[1]) if value is not None and value.ndim == 4 else 0


def _scalable(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return node.target in CONVOLUTIONS and constant(graph_module, node.args[1]) is not None and _channels(node) > 1


def _reads_channels(graph_module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    """A convolution with a weight of its own for each channel that it reads."""
    if not _scalable(graph_module, node) or node.args[0] is not source:
        return False
    return _weight(graph_module, node).shape[1] == _channels(source) or _is_depthwise(graph_module, node)


def _is_depthwise(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    weight = _weight(graph_module, node)
    return weight.shape[1] == 1 and weight.shape[0] == _channels(node.args[0])  # type: ignore[arg-type]


def _weight(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    weight = constant(graph_module, node.args[1])
    assert weight is not None
    return weight
