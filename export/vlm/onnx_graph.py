"""ONNX files of a generative student: the picture, and one decoder graph for prompts and single tokens alike.

The decoder takes `prefix` (float32 [1, P, W], P = 0 after the prompt), `ids` (int32 [1, T]), `positions` (int32
[P + T]) and the caches, and gives `logits` [1, V] of the next token and the caches. One graph serves both, because a
second one would hold the weights twice; its shapes are static but for P and T. A runtime may bind a cache as input and
as output.

The token table is in the file once: its rows are looked up and it is the output layer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pocketvlm.edge.errors import require
from pocketvlm.edge.vlm_bundle import VlmContract
from pocketvlm.edge.vlm_onnxruntime import cache_names
from pocketvlm.export.prepare import STEM_LAYERS
from pocketvlm.export.targets.onnx import OPSET, quiet, stamp
from pocketvlm.export.targets.onnx_ladder import weights_to_int8
from pocketvlm.export.targets.onnx_names import shorten
from pocketvlm.export.vlm.blocks import Blocks, pack_blocks
from pocketvlm.export.vlm.graphs import Picture, checked_step, empty_caches
from pocketvlm.students.vlm.model import Vlm

_DOMAIN = "com.microsoft"
# of MatMulNBits: activations in int8, a scale for each block
_ACCURACY = 4
_TABLE = "words"


class OnnxWriter:
    """Converts both graphs once, in float32, and writes them at any precision.

    int8, w4: every matrix of the decoder and the token table in blocks of 32 (MatMulNBits); of the picture's graph the
    weights in 8 bits with a scale for each output channel, computing in float.
    """

    def __init__(self, model: Vlm, contract: VlmContract) -> None:
        self._onnx = require("onnx", "onnx")
        require("onnxscript", "onnx")
        self._model, self._digest = model, contract.digest()
        self._picture, self._decoder = _picture(model), _core(model, checked_step(model))

    def write(self, precision: str, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        """Both files: paths under `folder`, and notes."""
        files = {part: f"onnx/{part}-{precision}.onnx" for part in ("picture", "decoder")}
        picture = copy.deepcopy(self._picture)
        if precision != "fp32":
            weights_to_int8(picture, float_convolutions=STEM_LAYERS)
        self._finish(picture, "picture", precision, folder / files["picture"])
        self._finish(self._decoder_at(precision), "decoder", precision, folder / files["decoder"])
        scheme = {"fp32": "float32", "int8": "int8-blocks-of-32", "w4": "int4-blocks-of-32"}[precision]
        return files, {"opset": OPSET, "scheme": scheme}

    def _decoder_at(self, precision: str) -> Any:
        written = copy.deepcopy(self._decoder)
        make = _Nodes(self._onnx, written.graph)
        table = self._model.decoder.embed_tokens.weight.detach().numpy()
        bits = {"fp32": 32, "int8": 8, "w4": 4}[precision]
        if bits == 32:
            make.constant(_TABLE, table)
            found = make.node("Gather", [_TABLE, "ids"], axis=0)
            make.node("Gemm", ["hidden", _TABLE], "logits", transB=1)
        else:
            _matrices_in_blocks(make, bits)
            blocks = pack_blocks(table, bits)
            make.constants(_TABLE, blocks)
            found = _looked_up(make, blocks)
            make.product("hidden", _TABLE, blocks, "logits")
        both = make.node("Concat", ["prefix", found], axis=1)
        make.node("Reshape", [both, make.constant("x_shape", np.array([-1, table.shape[1]], np.int64))], "x")
        _interface(written, self._model, self._onnx)
        _sort(written.graph)
        return written

    def _finish(self, written: Any, part: Any, precision: str, path: Path) -> None:
        stamp(written, part, precision, self._digest)
        shorten(written)
        self._onnx.checker.check_model(written)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._onnx.save(written, str(path))


def _picture(model: Vlm) -> Any:
    """`pixels` (uint8 [1, S, S, 3]) to `prefix` (float32 [1, P, W]), in float32."""
    size = model.config.vision.size
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Picture(model).eval(),
            (torch.zeros(1, size, size, 3, dtype=torch.uint8),),
            dynamo=True,
            input_names=["pixels"],
            output_names=["prefix"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _core(model: Vlm, step: nn.Module) -> Any:
    """The step from embeddings `x` to `hidden`, in float32."""
    config = model.config.decoder
    caches = empty_caches(model.decoder)
    names = cache_names(config.layers)
    length = model.prefix + 3
    free = torch.export.Dim("length", min=2, max=config.context_length)
    example = (torch.zeros(length, config.width), torch.arange(length, dtype=torch.int32), *caches)
    with quiet(), torch.no_grad():
        captured = torch.export.export(
            step, example, dynamic_shapes={"x": {0: free}, "positions": {0: free}, "caches": (None,) * len(caches)}
        )
        program = torch.onnx.export(
            captured,
            (),
            dynamo=True,
            input_names=["x", "positions", *names],
            output_names=["hidden", *(f"new_{name}" for name in names)],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    _simplify_reshapes(program.model_proto)
    return program.model_proto


class _Nodes:
    """Adds to a graph; a result that is not named gets a name of its own."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx, self.graph, self._count = onnx, graph, 0

    def node(self, kind: str, inputs: list[str], output: str = "", domain: str = "", **attributes: Any) -> str:
        self._count += 1
        output = output or f"{_TABLE}_{self._count}"
        self.graph.node.append(self.onnx.helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def constants(self, name: str, blocks: Blocks) -> None:
        self.constant(f"{name}_blocks", blocks.data)
        self.constant(f"{name}_scales", blocks.scales)

    def product(self, x: str, name: str, blocks: Blocks, output: str) -> None:
        """x [..., K] times a packed matrix, [..., N]."""
        self.node(
            "MatMulNBits",
            [x, f"{name}_blocks", f"{name}_scales"],
            output,
            _DOMAIN,
            K=blocks.columns,
            N=len(blocks.data),
            bits=blocks.bits,
            block_size=blocks.size,
            accuracy_level=_ACCURACY,
        )


def _looked_up(make: _Nodes, blocks: Blocks) -> str:
    """Rows of a packed table as float32 [1, T, W], by operators that every runtime has."""
    data = make.node("Cast", [make.node("Gather", [f"{_TABLE}_blocks", "ids"], axis=0)], to=1)
    last = make.constant("last_axis", np.array([-1], np.int64))
    if blocks.bits == 4:
        # two to a byte, the first in its lower half
        sixteen = make.constant("sixteen", np.array(16, np.float32))
        high = make.node("Floor", [make.node("Div", [data, sixteen])])
        low = make.node("Sub", [data, make.node("Mul", [high, sixteen])])
        halves = [make.node("Unsqueeze", [half, last]) for half in (low, high)]
        shape = make.constant("blocks_shape", np.array([1, -1, blocks.data.shape[1], blocks.size], np.int64))
        data = make.node("Reshape", [make.node("Concat", halves, axis=-1), shape])
    zero = make.constant("middle", np.array(2 ** (blocks.bits - 1), np.float32))
    scales = make.node("Unsqueeze", [make.node("Gather", [f"{_TABLE}_scales", "ids"], axis=0), last])
    rows = make.node("Mul", [make.node("Sub", [data, zero]), scales])
    shape = make.constant("rows_shape", np.array([1, -1, blocks.data.shape[1] * blocks.size], np.int64))
    rows = make.node("Reshape", [rows, shape])
    if blocks.columns % blocks.size == 0:
        return rows
    ends = [make.constant(f"columns_{n}", np.array([value], np.int64)) for n, value in enumerate((0, blocks.columns))]
    return make.node("Slice", [rows, *ends, last])


def _matrices_in_blocks(make: _Nodes, bits: int) -> None:
    """Every product by a constant becomes a MatMulNBits, in place. A linear layer without a bias is a MatMul for inputs
    of three dimensions, a Gemm with a transposed matrix for two."""
    graph, to_array = make.graph, make.onnx.numpy_helper.to_array
    constants = {entry.name: entry for entry in graph.initializer}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        layer = node.op_type == "Gemm" and len(node.input) == 2 and _attribute(node, "transB") == 1
        if not (node.op_type == "MatMul" or layer) or node.input[1] not in constants:
            graph.node.append(node)
            continue
        name = node.input[1]
        weight = to_array(constants[name])
        blocks = pack_blocks(weight if layer else weight.T, bits)
        make.constants(name, blocks)
        make.product(node.input[0], name, blocks, node.output[0])
    _drop_dead(graph)


def _attribute(node: Any, name: str) -> int:
    return next((entry.i for entry in node.attribute if entry.name == name), 0)


def _simplify_reshapes(model: Any) -> None:
    """A shape put together from constants and one length becomes a constant with -1 there: one operator instead of
    several, in each of many reshapes."""
    onnx = require("onnx", "onnx")
    graph = model.graph
    known = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        shape = made.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None or shape.op_type != "Concat":
            continue
        parts = [known.get(name) for name in shape.input]
        if sum(part is None for part in parts) != 1 or any(part is not None and (part <= 0).any() for part in parts):
            continue
        sizes = np.concatenate([np.array([-1]) if part is None else part.reshape(-1) for part in parts])
        name = "shape_" + "_".join(str(size) for size in sizes).replace("-1", "n")
        if name not in known:
            known[name] = sizes.astype(np.int64)
            graph.initializer.append(onnx.numpy_helper.from_array(known[name], name))
        node.input[1] = name
    _drop_dead(graph)


def _drop_dead(graph: Any) -> None:
    wanted = {entry.name for entry in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [entry for entry in graph.initializer if entry.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def _interface(written: Any, model: Vlm, onnx: Any) -> None:
    """Inputs and outputs as the module's heading says."""
    graph, config, helper = written.graph, model.config.decoder, onnx.helper
    caches = {entry.name: entry for entry in graph.input if entry.name in cache_names(config.layers)}
    del graph.input[:]
    graph.input.extend(
        [
            helper.make_tensor_value_info("prefix", onnx.TensorProto.FLOAT, [1, "prefix", config.width]),
            helper.make_tensor_value_info("ids", onnx.TensorProto.INT32, [1, "tokens"]),
            helper.make_tensor_value_info("positions", onnx.TensorProto.INT32, ["length"]),
            *caches.values(),
        ]
    )
    outputs = [entry for entry in graph.output if entry.name != "hidden"]
    del graph.output[:]
    vocabulary = model.decoder.embed_tokens.num_embeddings
    graph.output.append(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, vocabulary]))
    graph.output.extend(outputs)
    if not any(entry.domain == _DOMAIN for entry in written.opset_import):
        written.opset_import.append(helper.make_opsetid(_DOMAIN, 1))


def _sort(graph: Any) -> None:
    """Nodes after what they read."""
    known = {entry.name for entry in (*graph.input, *graph.initializer)} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "the graph has no cycle"
        # in passes, so that a long chain in order costs one
        rest = []
        for node in waiting:
            if known.issuperset(node.input):
                ordered.append(node)
                known.update(node.output)
            else:
                rest.append(node)
        waiting = rest
    del graph.node[:]
    graph.node.extend(ordered)
