"""GELU in an exported graph: x Phi(x), which the exporter writes as five operators (Hendrycks and Gimpel 2016,
arXiv:1606.08415).

onnxruntime has one kernel for it, several times faster, and puts it in where it knows the five by their order, which is
not the exporter's. In a file with quantized values it does not: each of the two that read x gets its own copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketvlm.edge.errors import require

_FUSED = "com.microsoft"


@dataclass(frozen=True)
class _Gelu:
    """x * (0.5 * (1 + erf(x / sqrt(2)))), or (x * (1 + erf(x / sqrt(2)))) * 0.5. nodes: in that order."""

    x: str
    half: str
    nodes: tuple[Any, Any, Any, Any, Any]


def reorder_gelu(model: Any) -> int:
    """x * (0.5 * (1 + erf)) becomes (x * (1 + erf)) * 0.5, in place; the same numbers, as a half loses no digit.

    Returns:
        The number of GELUs.
    """
    found = _gelus(model.graph)
    for gelu in found:
        *_, add, inner, outer = gelu.nodes
        inner.input[:] = [gelu.x, add.output[0]]
        outer.input[:] = [inner.output[0], gelu.half]
    return len(found)


def fuse_gelu(model: Any) -> int:
    """The five operators become onnxruntime's own Gelu, in place; returns how many there were."""
    onnx = require("onnx", "onnx")
    graph = model.graph
    found = _gelus(graph)
    for gelu in found:
        *_, outer = gelu.nodes
        fused = onnx.helper.make_node("Gelu", [gelu.x], [outer.output[0]], domain=_FUSED)
        graph.node.insert(list(graph.node).index(outer), fused)
        for node in gelu.nodes:
            graph.node.remove(node)
    if found and all(entry.domain != _FUSED for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_FUSED, 1))
    return len(found)


def gelu_sums(graph: Any) -> list[str]:
    """Names of the sums 1 + erf, which are no sums of activations."""
    return [gelu.nodes[2].name for gelu in _gelus(graph)]


def _gelus(graph: Any) -> list[_Gelu]:
    readers: dict[str, list[Any]] = {}
    producer = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def only(node: Any, kind: str) -> Any | None:
        behind = readers.get(node.output[0], [])
        return behind[0] if len(behind) == 1 and behind[0].op_type == kind else None

    found = []
    for erf in graph.node:
        divide = producer.get(erf.input[0]) if erf.op_type == "Erf" else None
        chain = [divide, erf]
        for kind in ("Add", "Mul", "Mul"):
            chain.append(only(chain[-1], kind) if chain[-1] is not None else None)
        if divide is None or divide.op_type != "Div" or chain[-1] is None:
            continue
        _, _, add, inner, outer = chain
        others = [*(n for n in inner.input if n != add.output[0]), *(n for n in outer.input if n != inner.output[0])]
        x = divide.input[0]
        if x in others and len(others) == 2:
            others.remove(x)
            found.append(_Gelu(x, others[0], (divide, erf, add, inner, outer)))
    return found
