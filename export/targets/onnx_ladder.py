"""Rewrites of an exported float32 ONNX graph: half precision, weights of 8 and 4 bits, ranges set ahead of time."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.errors import require
from pocketvlm.export.rounding import SMALLEST_KERNEL
from pocketvlm.export.stems import STORED
from pocketvlm.export.token_tables import BLOCK

WEIGHT_MAX = 127
# smaller constants (biases written as factors, norms) cost nothing in float
_SMALLEST_WEIGHT = 256
# sums of squares overflow float16 beyond 65504, and a quotient of small sums has few digits left
_FLOAT32_OPS = ("LayerNormalization", "Softmax", "ReduceL2", "ReduceSum", "ReduceMean", "Pow", "Sqrt", "Reciprocal")
_WEIGHTED = ("Conv", "Gemm", "MatMul")


def to_half(model: Any) -> Any:
    """Weights and arithmetic in float16, inputs and output as they were.

    Softmax, LayerNorm and every sum over a row stay in float32; constants beyond float16's range are cut to it.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    blocked = [*DEFAULT_OP_BLOCK_LIST, *_FLOAT32_OPS]
    wrapped = ONNXModel(convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked))
    # its casts come after their readers
    wrapped.topological_sort()
    return wrapped.model


def weights_to_int8(
    model: Any, kinds: tuple[str, ...] = _WEIGHTED, float_convolutions: int = 0, floats: Collection[str] = ()
) -> int:
    """Store the constant weights of these operators as int8 with a scale per output channel, in place.

    Activations and arithmetic stay float. Linear layers read theirs from a DequantizeLinear, for which onnxruntime has
    a kernel of its own; convolutions from a Cast and a Mul, which every runtime computes once, when it loads the file
    (onnxruntime keeps a DequantizeLinear for each run, and a convolution behind one is several times slower).
    float_convolutions: so many at the input stay as they are, but for large weights (`STORED`), which are rounded as by
    `round_kernels`. floats: operators that compute these values stay too.

    Returns:
        The number of operators whose weights were replaced.
    """
    onnx = require("onnx", "onnx")
    constants = {entry.name: entry for entry in model.graph.initializer}
    done: dict[tuple[str, int], str] = {}
    added: list[Any] = []
    changed = 0
    stem = {node.output[0] for node in [n for n in model.graph.node if n.op_type == "Conv"][:float_convolutions]}
    for node in model.graph.node:
        if node.op_type not in kinds or node.input[1] not in constants or node.output[0] in floats:
            continue
        name = node.input[1]
        weight = onnx.numpy_helper.to_array(constants[name])
        smallest = STORED if node.output[0] in stem else _SMALLEST_WEIGHT
        if weight.dtype != np.float32 or weight.ndim < 2 or weight.size < smallest:
            continue
        axis = _output_axis(node, weight.ndim)
        if (name, axis) not in done:
            done[name, axis] = value = f"{name}_of_int8_{axis}"
            axes = (0, 1) if node.output[0] in stem and weight[0, 0].size >= SMALLEST_KERNEL else (axis,)
            scale = _scale(weight, axes)
            levels, steps = f"{name}_int8_{axis}", f"{name}_scale_{axis}"
            make = onnx.helper.make_node
            if node.op_type == "Conv":
                cast = make("Cast", [levels], [f"{value}_cast"], to=onnx.TensorProto.FLOAT)
                added += [cast, make("Mul", [f"{value}_cast", steps], [value])]
            else:
                added.append(make("DequantizeLinear", [levels, steps], [value], axis=axis))
            parts = {
                levels: np.round(weight / scale).astype(np.int8),
                steps: scale if node.op_type == "Conv" else scale.ravel(),
            }
            model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in parts.items())
        node.input[1] = done[name, axis]
        changed += 1
    for node in reversed(added):
        model.graph.node.insert(0, node)
    _drop_unused(model)
    return changed


def weights_to_int4(model: Any, float_convolutions: int = 0) -> Any:
    """Linear layers in 4 bits, blocks of 32 with a scale and a zero point each; convolutions as `weights_to_int8`.

    Written as onnxruntime's own MatMulNBits, which no other runtime knows.
    """
    require("onnx_ir", "onnx")
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK, is_symmetric=False, bits=4, op_types_to_quantize=("MatMul",)
    )
    quantizer = MatMulNBitsQuantizer(wrapped.model, algo_config=config)
    quantizer.process()
    rewritten = quantizer.model.model
    weights_to_int8(rewritten, ("Conv",), float_convolutions)
    return rewritten


def quantize_ahead(
    source: Path, target: Path, batches: list[dict[str, NDArray[Any]]], method: str, sums: bool, float_nodes: list[str]
) -> Path:
    """Static 8 bits for every operator with constant weights: QDQ pairs, weights per output channel.

    Products of two activations (attention), softmax and LayerNorm stay in float. method: how ranges are set, one of
    "MinMax", "Percentile", "Entropy". sums: residual sums too. float_nodes: names of nodes to leave alone.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    onnx = require("onnx", "onnx")
    graph = onnx.load(str(source)).graph
    constants = {entry.name for entry in graph.initializer}
    products = [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] not in constants]
    quantize_static(
        str(source),
        str(target),
        Batches(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=[*_WEIGHTED, "Clip", "Relu", *(["Add"] if sums else [])],
        nodes_to_exclude=[*float_nodes, *products],
        calibrate_method=getattr(CalibrationMethod, method),
        # residual sums, attention and the last normalisation read them: rounded, they are what ruins transformers
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
    )
    return target


class Batches:
    """Calibration inputs for onnxruntime (duck-typed `CalibrationDataReader`)."""

    def __init__(self, batches: list[dict[str, NDArray[Any]]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)


def _output_axis(node: Any, ndim: int) -> int:
    if node.op_type == "Conv":
        return 0
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed else ndim - 1


def _scale(weight: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float32]:
    """One for each index along these axes, in a shape that multiplies the weight."""
    others = tuple(at for at in range(weight.ndim) if at not in axes)
    largest = np.maximum(np.abs(weight).max(axis=others, keepdims=True), 1e-12)
    return largest.astype(np.float32) / np.float32(WEIGHT_MAX)


def _drop_unused(model: Any) -> None:
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    kept = [entry for entry in model.graph.initializer if entry.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
