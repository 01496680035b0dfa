"""Operators of an ONNX graph that a plan keeps in float: from marked operators of a captured graph to names in a file.

The exporter traces a graph anew, so operators get other names; layers keep their order. It then names each value after
the operator that computes it, and onnxruntime's preparation keeps these names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from pocketvlm.export.graphs import in_float
from pocketvlm.export.prepare import CONVOLUTIONS, LINEARS, has_attention

_KINDS = (CONVOLUTIONS, LINEARS)
_SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_CLAMPS = ("Clip", "Relu")
_FLOAT = 1  # TensorProto.FLOAT


def marked_values(module: nn.Module, traced: fx.GraphModule, graph: Any) -> list[str]:
    """Names of the values that layers and sums compute which `mark_float` exempted in `module`.

    traced: `module`, traced anew. graph: the exporter's graph of that, not optimised yet.
    """
    if not isinstance(module, fx.GraphModule):
        return []
    found = []
    for kind in _KINDS:
        before, after = ([n for n in one.graph.nodes if n.target in kind] for one in (module, traced))
        if any(map(in_float, before)):
            assert len(before) == len(after), "tracing a graph of basic operators anew gives the same operators"
            found += [new.name for old, new in zip(before, after) if in_float(old)]
    # transformers have no sum in int8
    return found if has_attention(module) else found + _marked_sums(module, graph, found)


def _marked_sums(module: fx.GraphModule, graph: Any, layers: Sequence[str]) -> list[str]:
    """Sums lose their names on the way: told by their order among sums of two computed values, or, where converting
    has added or removed some, by reading a layer in float."""
    sums = [n for n in module.graph.nodes if n.target in _SUMS and all(_is_computed(a) for a in n.args[:2])]
    constants = {entry.name for entry in graph.initializer}
    floats = {entry.name for entry in graph.value_info if entry.type.tensor_type.elem_type == _FLOAT}
    adds = [n for n in graph.node if n.op_type == "Add" and n.output[0] in floats and not constants & set(n.input)]
    if len(sums) == len(adds):
        return [new.output[0] for old, new in zip(sums, adds) if in_float(old)]
    return [node.output[0] for node in adds if set(layers) & set(node.input)]


def _is_computed(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op != "get_attr" and argument.meta["val"].is_floating_point()


def nodes_behind(graph: Any, values: Sequence[str]) -> list[str]:
    """Names of the operators that compute these values, for `nodes_to_exclude` of onnxruntime's quantizers.

    A linear layer may be a product and a sum; clamps right behind belong to their layer.
    """
    producer = {name: node for node in graph.node for name in node.output}
    constants = {entry.name for entry in graph.initializer}
    chosen = []
    for name in values:
        node = producer[name]
        chosen.append(node)
        if node.op_type == "Add" and constants & set(node.input):
            chosen += [producer[part] for part in node.input if part in producer and producer[part].op_type == "MatMul"]
    outputs = {name for node in chosen for name in node.output}
    chosen += [node for node in graph.node if node.op_type in _CLAMPS and outputs & set(node.input)]
    # the quantizer makes a product and a sum of a Gemm before it looks at the names
    return [name for node in chosen for name in (node.name, f"{node.name}_MatMul")]
