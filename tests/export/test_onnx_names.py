"""A shortened file is the same function."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pocketvlm.export.targets.onnx_names import shorten


def small(zero: int = 0) -> onnx.ModelProto:
    """x times an int8 weight of two channels, plus a value whose short name is taken already."""
    weight = {
        "w_quantized": np.array([[3, -4], [5, 6]], np.int8),
        "w_scale": np.array([0.5, 2.0], np.float32),
        "w_zero_point": np.array([zero, zero], np.int8),
        "b_s": np.array([1.0, 1.0], np.float32),
        "b_scale": np.array([2.0, 3.0], np.float32),
    }
    nodes = [
        helper.make_node(
            "DequantizeLinear",
            ["w_quantized", "w_scale", "w_zero_point"],
            ["w_DequantizeLinear_Output"],
            "first",
            axis=1,
        ),
        helper.make_node("MatMul", ["x_scale", "w_DequantizeLinear_Output"], ["product"], "second"),
        helper.make_node("Mul", ["product", "b_s"], ["scaled"], "third"),
        helper.make_node("Add", ["scaled", "b_scale"], ["y"], "fourth"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x_scale", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(value, name) for name, value in weight.items()],
        value_info=[helper.make_tensor_value_info("product", TensorProto.FLOAT, [1, 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x_scale": np.array([[1.5, -2.0]], np.float32)})[0]


@pytest.mark.parametrize("zero", [0, 2])
def test_the_function_stays_and_only_zeros_are_dropped(zero: int) -> None:
    model = small(zero)
    before, size = run(model), model.ByteSize()
    shorten(model)
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(run(model), before)
    assert model.ByteSize() < size
    names = {entry.name for entry in model.graph.initializer}
    # "b_scale" would become "b_s", which is another
    assert {"b_s", "b_scale", "w_i8", "w_s"} <= names
    assert ("w_z" in names) == bool(zero)
    assert len(model.graph.node[0].input) == (3 if zero else 2)
    assert [entry.name for entry in (*model.graph.input, *model.graph.output)] == ["x_scale", "y"]
    assert not model.graph.value_info
    assert not any(node.name for node in model.graph.node)
