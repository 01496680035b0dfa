"""What a quantized ONNX file can do without: zero points that are zero, shapes that any runtime infers, names of nodes,
long names of values. In a student of two million weights that was a thirtieth of the file."""

from __future__ import annotations

from typing import Any

from pocketvlm.edge.errors import require

# what onnxruntime's quantizer and the exporter append, and what stands for it
_SHORTER = (
    ("_QuantizeLinear_Output", "_q"),
    ("_DequantizeLinear_Output", "_dq"),
    ("_QuantizeLinear_Input", "_qi"),
    ("_quantized_scale", "_qs"),
    ("_quantized_zero_point", "_qz"),
    ("_zero_point", "_z"),
    ("_scale", "_s"),
    ("_quantized", "_i8"),
)


def shorten(model: Any) -> None:
    """Drop all that, in place. Names of inputs and outputs stay; a short name that is taken is not given twice."""
    graph = model.graph
    _drop_zero_points(graph)
    fixed = {entry.name for entry in (*graph.input, *graph.output)}
    known = {name for node in graph.node for name in (*node.input, *node.output)} | {e.name for e in graph.initializer}
    renamed: dict[str, str] = {}
    for name in sorted(known - fixed):
        short = name
        for long, brief in _SHORTER:
            short = short.replace(long, brief)
        if short not in known and short not in fixed:
            renamed[name] = short
            known.add(short)
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    for entry in graph.initializer:
        entry.name = renamed.get(entry.name, entry.name)
    del graph.value_info[:]


def _drop_zero_points(graph: Any) -> None:
    """Of constants that DequantizeLinear makes float: left out, a zero point is zero (ONNX, DequantizeLinear-10)."""
    onnx = require("onnx", "onnx")
    constants = {entry.name: entry for entry in graph.initializer}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in constants:
            continue
        zero = constants.get(node.input[2])
        signed = zero is not None and zero.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT32)
        if signed and not onnx.numpy_helper.to_array(zero).any():
            del node.input[2]
    used = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    kept = [entry for entry in graph.initializer if entry.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
