"""ONNX files for onnxruntime (also its mobile and web builds): float32 and int8, any batch size."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import pocketvlm
from pocketvlm.edge.errors import UsageError, require
from pocketvlm.export.fidelity import Scheme, choose_scheme
from pocketvlm.export.prepare import Prepared, prepared
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant

OPSET = 18  # the newest that every onnxruntime since 1.14 (mobile and web builds included) runs in full
Tower = Literal["image", "text"]
INPUTS: dict[Tower, str] = {"image": "pixels", "text": "ids"}
OUTPUT = "embedding"
_OUTPUT_DRAFT = "pocketvlm_output"
_RELU6 = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)


class OnnxTarget:
    """`onnx/image-fp32.onnx` and so on. Inputs `pixels` (uint8 [B, S, S, 3]) or `ids` (int32 [B, L]), output
    `embedding` (float32 [B, D]); the contract's digest and the kit's version are in the model's properties.

    int8: token tables are int8 rows with a scale each; linear layers are balanced and dynamic, convolutions static but
    for the first three, biases corrected (`export.prepare`). Where a convolutional tower does not meet the floor, one
    with all convolutions in float is tried, and the better is kept.
    """

    name: ClassVar[str] = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")

    def __init__(self) -> None:
        for module in ("onnx", "onnxscript"):
            require(module, "onnx")

    def lower(self, towers: Towers, *, precision: Precision, folder: Path, calibration: Calibration | None) -> Variant:
        """Write the towers that exist, at this precision.

        Raises:
            UsageError: this backend has no such precision, or int8 without calibration data.
        """
        check_precision(self.name, self.precisions, precision, calibration)
        files: dict[str, str] = {}
        notes: dict[str, object] = {"opset": OPSET}
        for tower, module in present_towers(towers):
            relative = f"{self.name}/{tower}-{precision}.onnx"
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = example_rows(towers, tower)
            with quiet():
                if precision == "fp32":
                    export_graph(module, rows, tower, path, contract_digest=towers.contract.digest())
                else:
                    ready = prepared_tower(module, calibration, tower)
                    notes[tower] = _export_int8(ready, tower, path, towers.contract.digest())
            files[tower] = relative
        return Variant(self.name, precision, files, "dynamic", towers.contract.embed_dim, notes)


def check_precision(target: str, known: tuple[str, ...], precision: str, calibration: Calibration | None) -> None:
    """Refuse what a backend cannot write.

    Raises:
        UsageError: unknown precision, or int8 without calibration inputs.
    """
    if precision not in known:
        raise UsageError(
            f"target {target!r} cannot write precision {precision!r}, only {', '.join(known)}; "
            "nothing was exported, so choose one of those"
        )
    if precision == "int8" and calibration is None:
        raise UsageError(
            f"target {target!r} was asked for int8 without calibration data; ranges guessed from noise lose accuracy, "
            "so pass real data (--data, in Python calibration_data=...)"
        )


def prepared_tower(module: nn.Module, calibration: Calibration | None, tower: Tower) -> Prepared:
    """One tower made ready for int8, shared by all targets that are given the same calibration.

    Raises:
        UsageError: fewer than four, of which one has to judge the result.
    """
    assert calibration is not None, "check_precision has refused int8 without it"
    rows = calibration.pixels if tower == "image" else calibration.ids
    if len(rows) < 4:
        raise UsageError(
            f"int8 calibration of the {tower} tower was given {len(rows)} inputs and needs at least 4 (better 100 or "
            "more); nothing could be measured, so pass a data set that has them"
        )
    return prepared(module, np.ascontiguousarray(rows), calibration.memo)


def present_towers(towers: Towers) -> Iterator[tuple[Tower, nn.Module]]:
    """The towers that exist, in a fixed order."""
    if towers.image is not None:
        yield "image", towers.image
    if towers.text is not None:
        yield "text", towers.text


def example_rows(towers: Towers, tower: Tower) -> NDArray[Any]:
    """Two valid inputs of a tower, only good for tracing."""
    contract = towers.contract
    if tower == "image":
        assert contract.image is not None
        size = contract.image.size
        return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    assert contract.text is not None
    ids = np.full((2, contract.text.context_length), contract.text.pad_id, np.int32)
    # a text of ordinary tokens: token 1 at the least must exist and differ from padding
    ids[:, : max(1, contract.text.context_length // 2)] = 1 if contract.text.pad_id != 1 else 2
    return ids


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Converters announce every pass; their warnings tell a user of this kit nothing.

    The cyclic garbage collector rests meanwhile: it took a sixth of the time over graphs of millions of small objects,
    for a quarter of a gigabyte that it gave back earlier.
    """
    previous, collected = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)
    gc.disable()
    try:
        # their progress bars too; what they raise still passes
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        if collected:
            gc.enable()


def export_graph(module: nn.Module, rows: NDArray[Any], tower: Tower, path: Path, *, contract_digest: str) -> None:
    """One float32 tower to one self-contained ONNX file with a free batch size."""
    onnx = require("onnx", "onnx")
    batch = torch.export.Dim("batch", min=1, max=4096)
    captured = torch.export.export(module, (torch.from_numpy(rows),), dynamic_shapes=({0: batch},))
    for node in captured.graph.nodes:
        if node.target in _RELU6:
            # one operator of ONNX; decomposed with a free batch size, each costs a tenth of a second
            node.target = torch.ops.aten.clamp.default
    captured.graph_module.recompile()
    program = torch.onnx.export(
        captured,
        (),
        dynamo=True,
        input_names=[INPUTS[tower]],
        output_names=[_OUTPUT_DRAFT],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    # the exporter names values after their operators, and a token lookup is called "embedding" too
    _rename(model, OUTPUT, f"{OUTPUT}_value")
    _rename(model, _OUTPUT_DRAFT, OUTPUT)
    _stamp(model, tower, "fp32", contract_digest)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def run_file(path: Path, rows: NDArray[Any], tower: Tower, batch: int = 32) -> NDArray[np.float32]:
    """The file, read from disk, on onnxruntime's CPU provider with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = [session.run([OUTPUT], {INPUTS[tower]: rows[i : i + batch]})[0] for i in range(0, len(rows), batch)]
    return np.concatenate(parts)


def _export_int8(ready: Prepared, tower: Tower, path: Path, digest: str) -> dict[str, object]:
    onnx = require("onnx", "onnx")
    with tempfile.TemporaryDirectory() as scratch:
        schemes = _schemes(ready, tower, Path(scratch), digest)
        candidate, _, notes = choose_scheme(schemes, lambda file: run_file(file, ready.held, tower), ready.expected)
        model = onnx.load(str(candidate))
        _stamp(model, tower, "int8", digest)
        onnx.save(model, str(path))
    return notes


def _schemes(ready: Prepared, tower: Tower, folder: Path, digest: str) -> list[Scheme[Path]]:
    """What to try, in order: linear layers are always dynamic, convolutions static where there are any."""

    def exported(static: bool) -> tuple[Path, int]:
        graph, float_layers = ready.graph(static=static)
        path = folder / f"prepared-{float_layers}.onnx"
        export_graph(graph, ready.fit[:2], tower, path, contract_digest=digest)
        return path, float_layers

    def dynamic() -> Path:
        return _quantize_dynamic(exported(False)[0], folder / "dynamic.onnx")

    def static() -> Path:
        source, float_layers = exported(True)
        target = folder / "static.onnx"
        _quantize_static(source, target, ready.fit, tower, ready.attention, float_layers)
        return _quantize_dynamic(target, folder / "mixed.onnx")

    if not ready.convolutional:
        return [Scheme("dynamic", dynamic)]
    return [Scheme("static-qdq", static), Scheme("dynamic", dynamic, last_resort=True)]


def _quantize_dynamic(source: Path, target: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnx = require("onnx", "onnx")
    model = onnx.load(str(source))
    _forget_initializer_shapes(model)
    onnx.save(model, str(source))
    quantize_dynamic(
        str(source),
        str(target),
        weight_type=QuantType.QInt8,
        per_channel=True,
        # ConvInteger has no fast kernel on the CPU provider: it is 30 times slower than the float convolution
        op_types_to_quantize=["MatMul", "Gemm"],
    )
    return target


def _quantize_static(
    source: Path, target: Path, fit: NDArray[Any], tower: Tower, attention: bool, float_layers: int
) -> Path:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx = require("onnx", "onnx")
    model = onnx.load(str(source))
    _forget_initializer_shapes(model)
    onnx.save(model, str(source))
    prepared = source.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    kinds = ["Conv", "Clip", "Relu"]
    # 8-bit residual sums ruin transformers; convolutional towers run them in int8 from end to end
    kinds += [] if attention else ["Add"]
    quantize_static(
        str(prepared),
        str(target),
        _Reader(fit, INPUTS[tower]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=kinds,
        nodes_to_exclude=_stem(onnx.load(str(prepared)).graph, float_layers),
        calibrate_method=CalibrationMethod.MinMax,
    )
    return target


def _stem(graph: Any, layers: int) -> list[str]:
    """Names of the first convolutions and of the clamps right behind them."""
    chosen = [node for node in graph.node if node.op_type == "Conv"][:layers]
    outputs = {name for node in chosen for name in node.output}
    clamps = [node for node in graph.node if node.op_type in ("Clip", "Relu") and outputs & set(node.input)]
    return [node.name for node in (*chosen, *clamps)]


class _Reader:
    """Calibration batches for onnxruntime (duck-typed `CalibrationDataReader`)."""

    def __init__(self, rows: NDArray[Any], name: str, batch: int = 16) -> None:
        self._batches = iter([{name: rows[i : i + batch]} for i in range(0, len(rows), batch)])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)


def _forget_initializer_shapes(model: Any) -> None:
    """The exporter lists initializers among inferred shapes; onnxruntime's quantizer sees a contradiction there."""
    weights = {entry.name for entry in model.graph.initializer}
    kept = [entry for entry in model.graph.value_info if entry.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)


def _rename(model: Any, old: str, new: str) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for entries in (model.graph.output, model.graph.value_info, model.graph.initializer):
        for entry in entries:
            if entry.name == old:
                entry.name = new


def _strip(model: Any) -> None:
    """Drop stack traces: they hold paths of this machine and weigh as much as a small tower."""
    model.doc_string = ""
    model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    for entry in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        entry.doc_string = ""
        del entry.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _stamp(model: Any, tower: Tower, precision: str, digest: str) -> None:
    _strip(model)
    model.producer_name, model.producer_version = "pocketvlm", pocketvlm.__version__
    del model.metadata_props[:]
    properties = {"tower": tower, "precision": precision, "contract_sha256": digest}
    for key, value in properties.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"pocketvlm.{key}", value
