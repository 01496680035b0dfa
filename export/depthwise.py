"""Convolutions with one input channel and several outputs per group, made depthwise ones.

No runtime has an int8 kernel for them (onnxruntime multiplies group by group, some thirty times slower than its
depthwise kernel on FastViT's first). Reading the input several times over, they are depthwise, for which all have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx

from pocketvlm.export.graphs import constant, prune, set_parameter

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding)
# position of the number of groups among the arguments
_GROUPS = 6


def make_depthwise(graph_module: fx.GraphModule) -> int:
    """Rewrite them in place, wherever one ordinary convolution is all that reads the result, which keeps its name.

    y_(g m + k) = w_(g m + k) * x_g for m outputs per group becomes m copies of x behind one another, so that channel
    g m + k comes to place k groups + g; the weight of the convolution behind has its input channels in that order.

    Returns:
        The number of convolutions rewritten.
    """
    changed = 0
    for node in list(graph_module.graph.nodes):
        reader = _only_reader(graph_module, node) if _several_outputs(graph_module, node) else None
        if reader is None:
            continue
        weight, groups = _weight(graph_module, node), cast(int, node.args[_GROUPS])
        copies = weight.shape[0] // groups
        order = torch.arange(weight.shape[0]).reshape(groups, copies).T.flatten()
        source = cast(fx.Node, node.args[0])
        with graph_module.graph.inserting_before(node):
            wide = graph_module.graph.call_function(_aten.cat.default, ([source] * copies, 1))
        wide.meta = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
        wide.meta["val"] = torch.cat([source.meta["val"]] * copies, 1)
        node.args = (wide, *node.args[1:_GROUPS], weight.shape[0])
        set_parameter(graph_module, node, 1, weight[order], "depthwise_weight")
        bias = constant(graph_module, node.args[2])
        if bias is not None:
            set_parameter(graph_module, node, 2, bias[order], "depthwise_bias")
        set_parameter(graph_module, reader, 1, _weight(graph_module, reader)[:, order], "ordered_weight")
        changed += 1
    prune(graph_module)
    return changed


def is_depthwise(shape: Sequence[int]) -> bool:
    """Whether a weight [out, in / groups, ...] is that of a depthwise convolution in two dimensions."""
    return len(shape) == 4 and shape[1] == 1 and shape[0] > 1


def _several_outputs(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether this is a convolution of one input channel and several outputs per group."""
    if node.target not in _CONVOLUTIONS or len(node.args) <= _GROUPS:
        return False
    weight, groups = constant(graph_module, node.args[1]), cast(int, node.args[_GROUPS])
    return weight is not None and groups > 1 and weight.shape[1] == 1 and weight.shape[0] > groups


def _only_reader(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The ordinary convolution that alone reads this value; None where there is none."""
    reader = next(iter(node.users)) if len(node.users) == 1 else node
    if reader.target not in _CONVOLUTIONS or reader.args[0] is not node:
        return None
    ordinary = len(reader.args) <= _GROUPS or reader.args[_GROUPS] == 1
    return reader if ordinary and constant(graph_module, reader.args[1]) is not None else None


def _weight(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    return cast(Tensor, constant(graph_module, node.args[1]))
