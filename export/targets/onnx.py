"""ONNX files for onnxruntime (also its mobile and web builds): float32, float16 and six ways to quantize, any batch."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import pocketvlm
from pocketvlm.edge.errors import UsageError, require
from pocketvlm.export.fidelity import Scheme, choose_scheme, fidelity
from pocketvlm.export.graphs import pool_by_mean
from pocketvlm.export.half import half_graph
from pocketvlm.export.mixed import Plan, kept
from pocketvlm.export.precision import CALIBRATED
from pocketvlm.export.prepare import (
    STEM_LAYERS,
    Prepared,
    Rounding,
    prepared,
    weight_only_graph,
)
from pocketvlm.export.rounding import round_blocks, round_weight
from pocketvlm.export.static import Static, balance_notes, static_tower
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant, check_precision
from pocketvlm.export.targets.onnx_float import marked_values, nodes_behind
from pocketvlm.export.targets.onnx_gelu import fuse_gelu, gelu_sums, reorder_gelu
from pocketvlm.export.targets.onnx_ladder import Batches, quantize_ahead, to_half, weights_to_int4, weights_to_int8
from pocketvlm.export.targets.onnx_names import shorten
from pocketvlm.export.targets.onnx_steps import tensor_overrides
from pocketvlm.export.tuned import tuning_notes

OPSET = 18  # the newest that every onnxruntime since 1.14 (mobile and web builds included) runs in full
Tower = Literal["image", "text"]
INPUTS: dict[Tower, str] = {"image": "pixels", "text": "ids"}
OUTPUT = "embedding"
# calibration inputs that each of onnxruntime's calibrators gets; the latter two keep histograms of every activation
CALIBRATOR_ROWS = {"MinMax": 256, "Percentile": 48, "Entropy": 48}
ROUNDINGS = {
    "w8": Rounding(round_weight, "none"),
    "w4": Rounding(round_blocks, "none"),
    "w8a8-dynamic": Rounding(round_weight, "rows"),
}
_OUTPUT_DRAFT = "pocketvlm_output"
_RELU6 = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)


class OnnxTarget:
    """`onnx/image-fp32.onnx` and so on. Inputs `pixels` (uint8 [B, S, S, 3]) or `ids` (int32 [B, L]), output
    `embedding` (float32 [B, D]); the contract's digest and the kit's version are in the model's properties.

    fp16: arithmetic in float16, sums over rows in float32. w8: int8 weights, made float by the graph. w4: linear
    layers and token tables in 4 bits and blocks of 32 (MatMulNBits, onnxruntime's own), convolutions as w8.
    w8a8-dynamic: linear layers set their range when an input arrives, convolutions as w8. w8a8-static: ranges set ahead
    of time, by the best of three calibrators. All but fp16 have the first three convolutions in float.

    int8: token tables are int8 rows with a scale each; linear layers are balanced and dynamic, convolutions static but
    for the first three, biases corrected (`export.prepare`). Where a convolutional tower does not meet the floor, one
    with all convolutions in float is tried, and the better is kept. mixed: int8 with the blocks of a plan in float.
    """

    name: ClassVar[str] = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "w8", "mixed", "w8a8-dynamic", "w8a8-static", "int8", "w4")
    defaults: ClassVar[tuple[str, ...]] = ("fp32", "int8")
    refused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("palette8", "palette6", "palette4"), "no operator of ONNX looks weights up in a table"
    )

    def __init__(self) -> None:
        for module in ("onnx", "onnxscript"):
            require(module, "onnx")

    def lower(
        self,
        towers: Towers,
        *,
        precision: Precision,
        folder: Path,
        calibration: Calibration | None,
        plan: Plan | None = None,
    ) -> Variant:
        """Write the towers that exist, at this precision.

        Raises:
            UsageError: this backend has no such precision, or one that needs calibration data, or a plan, without it.
        """
        check_precision(self, precision, calibration, plan)
        files: dict[str, str] = {}
        notes: dict[str, object] = {"opset": OPSET}
        for tower, module in present_towers(towers):
            relative = f"{self.name}/{tower}-{precision}.onnx"
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = example_rows(towers, tower)
            with quiet():
                digest = towers.contract.digest()
                if precision == "fp32":
                    export_graph(module, rows, tower, path, contract_digest=digest)
                elif precision in CALIBRATED:
                    ready = prepared_tower(module, calibration, tower, plan if precision == "mixed" else None)
                    notes[tower] = _export_calibrated(ready, tower, path, digest, precision)
                else:
                    judge = prepared_tower(module, calibration, tower) if calibration else None
                    notes[tower] = _export_rewritten(module, judge, rows, tower, path, digest, precision)
            files[tower] = relative
        return Variant(self.name, precision, files, "dynamic", towers.contract.embed_dim, notes)


def prepared_tower(
    module: nn.Module, calibration: Calibration | None, tower: Tower, plan: Plan | None = None
) -> Prepared:
    """One tower made ready for int8, shared by all targets that are given the same calibration. plan: what of it stays
    in float.

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
    ready = prepared(module, np.ascontiguousarray(rows), calibration.memo)
    return ready.keeping(kept(plan, tower)) if kept(plan, tower) else ready


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


def export_graph(module: nn.Module, rows: NDArray[Any], tower: Tower, path: Path, *, contract_digest: str) -> list[str]:
    """One float32 tower to one self-contained ONNX file with a free batch size.

    Returns:
        Names of the values that operators exempted by `mark_float` compute; none where `module` is no graph.
    """
    onnx = require("onnx", "onnx")
    batch = torch.export.Dim("batch", min=1, max=4096)
    captured = torch.export.export(module, (torch.from_numpy(rows),), dynamic_shapes=({0: batch},))
    for node in captured.graph.nodes:
        if node.target in _RELU6:
            # one operator of ONNX; decomposed with a free batch size, each costs a tenth of a second
            node.target = torch.ops.aten.clamp.default
    pool_by_mean(captured.graph_module)
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
    reorder_gelu(model)
    floats = marked_values(module, captured.graph_module, model.graph)
    stamp(model, tower, "fp32", contract_digest)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return floats


def run_file(path: Path, rows: NDArray[Any], tower: Tower, batch: int = 32) -> NDArray[np.float32]:
    """The file, read from disk, on onnxruntime's CPU provider with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = [session.run([OUTPUT], {INPUTS[tower]: rows[i : i + batch]})[0] for i in range(0, len(rows), batch)]
    return np.concatenate(parts)


def _export_calibrated(ready: Prepared, tower: Tower, path: Path, digest: str, precision: str) -> dict[str, object]:
    onnx = require("onnx", "onnx")
    with tempfile.TemporaryDirectory() as scratch:
        schemes = (_static_schemes if precision == "w8a8-static" else _schemes)(ready, tower, Path(scratch), digest)
        candidate, scheme, notes = choose_scheme(
            schemes, lambda file: run_file(file, ready.held, tower), ready.expected
        )
        if precision != "w8a8-static" and scheme.name.startswith("static"):
            notes |= static_tower(ready).settings.notes()
        notes |= balance_notes(ready)
        model = onnx.load(str(candidate))
        stamp(model, tower, precision, digest)
        shorten(model)
        onnx.save(model, str(path))
    return notes | (tuning_notes(ready) if precision == "int8" else {})


def _export_rewritten(
    module: nn.Module,
    ready: Prepared | None,
    rows: NDArray[Any],
    tower: Tower,
    path: Path,
    digest: str,
    precision: str,
) -> dict[str, object]:
    """The precisions that can do without real inputs. ready: where there are some; they correct biases, and judge."""
    onnx = require("onnx", "onnx")
    with tempfile.TemporaryDirectory() as scratch:
        source, rewritten = Path(scratch) / "float.onnx", Path(scratch) / "rewritten.onnx"
        if precision == "fp16":
            halved, notes = half_graph(module, ready, rows)
            export_graph(halved, rows, tower, source, contract_digest=digest)
            model, scheme = to_half(onnx.load(str(source))), str(notes["scheme"])
        else:
            bits: Literal[4, 8] = 4 if precision == "w4" else 8
            rounding = ROUNDINGS[precision]
            graph = ready.rounded(rounding, bits) if ready else weight_only_graph(module, rows, bits)
            export_graph(graph, rows, tower, source, contract_digest=digest)
            model = onnx.load(str(source))
            if precision == "w4":
                _forget_initializer_shapes(model)
                model, scheme = weights_to_int4(model, STEM_LAYERS), "matmul-4-bit-blocks-of-32"
            elif precision == "w8":
                weights_to_int8(model, float_convolutions=STEM_LAYERS)
                scheme = "weights-per-channel"
            else:
                model, scheme = onnx.load(str(_quantize_dynamic(source, rewritten))), "dynamic"
                weights_to_int8(model, ("Conv",), STEM_LAYERS)
    stamp(model, tower, precision, digest)
    shorten(model)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    notes = {"scheme": scheme, "biases": "corrected" if ready else "as they were, for want of calibration data"}
    if ready:
        notes |= fidelity(run_file(path, ready.held, tower), ready.expected).notes(precision)
    return notes | (tuning_notes(ready, ROUNDINGS[precision]) if precision in ROUNDINGS else {})


def _static_schemes(ready: Prepared, tower: Tower, folder: Path, digest: str) -> list[Scheme[Path]]:
    """Every layer with weights static; the calibrators in the order of what they cost."""

    def static(method: str) -> Path:
        prepared = folder / "whole.prepared.onnx"
        if not prepared.exists():
            source = folder / "whole.onnx"
            graph = ready.rounded(Rounding(round_weight, "fixed"))
            export_graph(graph, ready.fit[:2], tower, source, contract_digest=digest)
            _preprocess(source, prepared)
        batches = _batches(ready.fit[: CALIBRATOR_ROWS[method]], tower)
        graph = require("onnx", "onnx").load(str(prepared)).graph
        floats = [*_stem(graph, STEM_LAYERS), *gelu_sums(graph)]
        target = quantize_ahead(prepared, folder / f"{method}.onnx", batches, method, not ready.attention, floats)
        return _finish_static(target, STEM_LAYERS)

    return [Scheme(f"static-qdq-{method.lower()}", partial(static, method)) for method in CALIBRATOR_ROWS]


def _schemes(ready: Prepared, tower: Tower, folder: Path, digest: str) -> list[Scheme[Path]]:
    """What to try, in order: linear layers are always dynamic, convolutions static where there are any."""

    onnx = require("onnx", "onnx")

    def exported(graph: Any, name: str) -> tuple[Path, list[str]]:
        path = folder / f"prepared-{name}.onnx"
        return path, export_graph(graph, ready.fit[:2], tower, path, contract_digest=digest)

    def dynamic() -> Path:
        # convolutions compute in float, from integer weights
        graph = ready.rounded(ROUNDINGS["w8a8-dynamic"]) if ready.convolutional else ready.graph(static=False)[0]
        source, floats = exported(graph, "dynamic")
        target = _quantize_dynamic(source, folder / "dynamic.onnx", floats)
        model = onnx.load(str(target))
        weights_to_int8(model, ("Conv",), STEM_LAYERS, floats)
        onnx.save(model, str(target))
        return target

    def static() -> Path:
        chosen = static_tower(ready)
        source, floats = exported(copy.deepcopy(chosen.graph), "static")
        target = folder / "static.onnx"
        _quantize_static(source, target, ready, tower, chosen, floats)
        mixed = _quantize_dynamic(target, folder / "mixed.onnx", floats)
        return _finish_static(mixed, chosen.settings.stem, floats)

    if not ready.convolutional:
        return [Scheme("dynamic", dynamic)]
    return [Scheme("static-qdq", static), Scheme("dynamic", dynamic, last_resort=True)]


def _quantize_dynamic(source: Path, target: Path, floats: Sequence[str] = ()) -> Path:
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
        nodes_to_exclude=nodes_behind(model.graph, floats),
    )
    return target


def _quantize_static(
    source: Path, target: Path, ready: Prepared, tower: Tower, static: Static, floats: Sequence[str] = ()
) -> Path:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    onnx = require("onnx", "onnx")
    prepared = source.with_suffix(".prepared.onnx")
    _preprocess(source, prepared)
    kinds = ["Conv", "Clip", "Relu"]
    # 8-bit residual sums ruin transformers; convolutional towers run them in int8 from end to end
    kinds += [] if ready.attention else ["Add"]
    graph = onnx.load(str(prepared)).graph
    quantize_static(
        str(prepared),
        str(target),
        # every range is known: two rows are for the quantizer, which wants to see some
        Batches(_batches(ready.fit[:2], tower)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=kinds,
        nodes_to_exclude=[*_stem(graph, static.settings.stem), *nodes_behind(graph, floats), *gelu_sums(graph)],
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"TensorQuantOverrides": tensor_overrides(static.graph, graph, static.steps)},
    )
    return target


def _finish_static(path: Path, float_convolutions: int, floats: Sequence[str] = ()) -> Path:
    """What the quantizer leaves: GELU between quantized values, and the weights of convolutions in float."""
    onnx = require("onnx", "onnx")
    model = onnx.load(str(path))
    fuse_gelu(model)
    weights_to_int8(model, ("Conv",), float_convolutions, floats)
    onnx.save(model, str(path))
    return path


def _preprocess(source: Path, target: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx = require("onnx", "onnx")
    model = onnx.load(str(source))
    _forget_initializer_shapes(model)
    onnx.save(model, str(source))
    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)


def _batches(rows: NDArray[Any], tower: Tower, batch: int = 16) -> list[dict[str, NDArray[Any]]]:
    return [{INPUTS[tower]: rows[i : i + batch]} for i in range(0, len(rows), batch)]


def _stem(graph: Any, layers: int) -> list[str]:
    """Names of the first convolutions and of the clamps right behind them."""
    chosen = [node for node in graph.node if node.op_type == "Conv"][:layers]
    outputs = {name for node in chosen for name in node.output}
    clamps = [node for node in graph.node if node.op_type in ("Clip", "Relu") and outputs & set(node.input)]
    return [node.name for node in (*chosen, *clamps)]


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


def stamp(model: Any, tower: Tower, precision: str, digest: str) -> None:
    """Metadata that names tower, precision and contract, in place of whatever the file says of its making."""
    _strip(model)
    model.producer_name, model.producer_version = "pocketvlm", pocketvlm.__version__
    del model.metadata_props[:]
    properties = {"tower": tower, "precision": precision, "contract_sha256": digest}
    for key, value in properties.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"pocketvlm.{key}", value
