"""How the weights of an ONNX file are rounded: a scale for each channel, one for the whole tensor, or not at all.

One scale for a tensor costs little on some models and the accuracy on others, and the distance of embeddings does not
tell which it was: a model that survives it today need not survive it after its next training. And a converter that fell
back to float without a word passes every comparison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.errors import require
from pocketvlm.export.budgets import Check

PER_TENSOR, NOT_QUANTIZED = "per_tensor_weights", "files_without_integers"
_SOURCE = "docs/parity.md: a scale for each output channel"
_FLOAT_SOURCE = "docs/parity.md: a reduced precision has integer weights"


def check_scales(bundle: Bundle, variant: BundleVariant, details: dict[str, Any]) -> list[Check]:
    """Two checks for each tower of an ONNX variant in 8 bits and less; none for other targets, whose files do not tell.

    A variant whose notes say `"weights": "per-tensor"` or `"float"` is believed, and that is not judged.

    Raises:
        MissingExtraError: the onnx package is not installed.
    """
    if variant.target != "onnx" or variant.precision in ("fp32", "fp16"):
        return []
    checks = []
    for tower, name in variant.files.items():
        each, whole, integers = weight_scales(bundle.path(name))
        declared = variant.notes.get("weights")
        if declared != "float":
            checks.append(
                Check(
                    NOT_QUANTIZED, tower, float(not integers), 0.0, "lower", "pass" if integers else "fail",
                    _FLOAT_SOURCE, "" if integers else f"{name} has no integer weight: the converter left it in float",
                )
            )  # fmt: skip
        details[f"{tower}, scales"] = {"per channel": len(each), "per tensor": len(whole)}
        if declared not in ("per-tensor", "float"):
            checks.append(
                Check(
                    PER_TENSOR, tower, float(len(whole)), 0.0, "lower", "fail" if whole else "pass", _SOURCE,
                    f"of {len(each) + len(whole)}, first {whole[0]!r}" if whole else "",
                )
            )  # fmt: skip
    return checks


def weight_scales(path: Path) -> tuple[list[str], list[str], bool]:
    """Names of the quantized weights with a scale for each channel (or block), of those with a single one, and whether
    there is any constant of 8 or 4 bits in two dimensions or more.

    Looked at are integer constants of two dimensions and more that a DequantizeLinear, MatMulInteger, ConvInteger or
    QLinear operator reads, or a Cast with a Mul by a constant behind it. Token tables that are looked up are no such
    weights.
    """
    onnx = require("onnx", "onnx")
    graph = onnx.load(str(path)).graph
    kind = onnx.TensorProto
    small = (kind.INT8, kind.UINT8, kind.INT4, kind.UINT4)
    integers = any(entry.data_type in small and len(entry.dims) > 1 for entry in graph.initializer)
    constants = {entry.name: list(entry.dims) for entry in graph.initializer}
    # operator -> positions of (weight, its scale); the integer operators scale later, by a product of both scales
    positions = {"DequantizeLinear": (0, 1), "QLinearConv": (3, 4), "QLinearMatMul": (3, 4)}
    each: list[str] = []
    whole: list[str] = []
    cast = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    for node in graph.node:
        if node.op_type in positions:
            weight, scale = (node.input[index] for index in positions[node.op_type])
        elif node.op_type in ("MatMulInteger", "ConvInteger"):
            weight = node.input[1]
            scale = weight.removesuffix("_quantized") + "_scale"
        elif node.op_type == "Mul" and cast.get(node.input[0]) in constants:
            weight, scale = cast[node.input[0]], node.input[1]
        else:
            continue
        shape = constants.get(weight, [])
        if len(shape) < 2 or scale not in constants:
            continue
        several = max(1, _size(constants[scale])) > 1 or _channels(node.op_type, shape) == 1
        (each if several else whole).append(weight)
    return each, whole, integers


def _channels(operator: str, shape: list[int]) -> int:
    return shape[-1] if operator in ("MatMulInteger", "QLinearMatMul") else shape[0]


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
