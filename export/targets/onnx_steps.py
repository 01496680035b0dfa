"""Grids of activations that are known ahead, for onnxruntime's static quantizer.

The exporter traces a graph anew and names its values after other operators, so that a value is found by its place: the
convolutions of both graphs, and the residual sums, come in one order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from pocketvlm.edge.errors import IntegrityError
from pocketvlm.export.fake_quant import Step
from pocketvlm.export.prepare import CONVOLUTIONS, clamp_of, residual_sums

_CLAMPS = ("Clip", "Relu")


def tensor_overrides(
    graph_module: fx.GraphModule, graph: Any, steps: Mapping[str, Step]
) -> dict[str, list[dict[str, Any]]]:
    """`TensorQuantOverrides` for `quantize_static`: ONNX value -> scale and zero point.

    graph_module: what `graph` (an ONNX GraphProto) was exported from. steps: node of `graph_module` -> grid.

    Raises:
        IntegrityError: the graphs do not have the same convolutions and sums.
    """
    names = _places(graph_module, graph)
    missing = sorted(set(steps) - set(names))
    if missing:
        raise IntegrityError(
            f"{len(missing)} ranges that were set for this tower have no place in its ONNX graph (first: {missing[0]})"
            "; the file would round elsewhere than was trained, so export without fine-tuning and report the student"
        )
    return {
        names[name]: [{"scale": np.array(step.scale, np.float32), "zero_point": np.array(step.zero, np.uint8)}]
        for name, step in steps.items()
    }


def _places(graph_module: fx.GraphModule, graph: Any) -> dict[str, str]:
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, str] = {}

    def same(node: fx.Node, name: str) -> None:
        if found.setdefault(node.name, name) != name:
            raise IntegrityError(
                f"value {node.name} of a prepared tower is {found[node.name]} and {name} in its ONNX graph; its range "
                "would be set for one of them only, so export without fine-tuning and report the student"
            )

    def both(node: fx.Node, operator: Any) -> None:
        same(node, operator.output[0])
        behind = [reader for reader in readers.get(operator.output[0], ()) if reader.op_type in _CLAMPS]
        clamp = clamp_of(node)
        if clamp is not None and behind:
            same(clamp, behind[0].output[0])

    convolutions = [node for node in graph_module.graph.nodes if node.target in CONVOLUTIONS]
    operators = [node for node in graph.node if node.op_type == "Conv"]
    if len(convolutions) == len(operators):
        for node, operator in zip(convolutions, operators):
            both(node, operator)
            same(node.args[0], operator.input[0])
    sums = residual_sums(graph_module, every=True)
    constants = {entry.name for entry in graph.initializer}
    adds = [node for node in graph.node if node.op_type == "Add" and not constants & set(node.input)]
    known = set(found.values())
    # sums on the way to the first convolution, and of what no convolution has seen, are no residual sums
    adds = [node for node in adds if _behind(node, graph, known)]
    if len(sums) == len(adds):
        for node, operator in zip(sums, adds):
            both(node, operator)
            for argument, name in zip(node.args, operator.input):
                same(argument, name)  # type: ignore[arg-type]
    return found


def _behind(add: Any, graph: Any, known: set[str]) -> bool:
    """Whether both terms depend on a value of a convolution."""
    producer = {name: node for node in graph.node for name in node.output}

    def depends(name: str) -> bool:
        seen, stack = set(), [name]
        while stack:
            current = stack.pop()
            if current in known and current in producer and producer[current].op_type == "Conv":
                return True
            if current in producer and current not in seen:
                seen.add(current)
                stack += producer[current].input
        return False

    return all(depends(name) for name in add.input)
