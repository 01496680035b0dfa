"""Every precision is what its name says, meets its floor on unseen inputs, and runs from its file."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from pocketvlm.edge.backends import open_backend
from pocketvlm.edge.bundle import PRECISION_ORDER
from pocketvlm.edge.conformance import DEFAULT_TOLERANCE
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.export import prepare, rounding, token_tables
from pocketvlm.export.budgets import load_budgets
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.mil.program import MilProgram, as_input, load_package
from pocketvlm.export.parity_coreml import _constants
from pocketvlm.export.precision import CALIBRATED, PRECISIONS, floor_of
from pocketvlm.export.prepare import STEM_LAYERS
from pocketvlm.export.targets import get_target, list_targets
from pocketvlm.export.targets.base import Towers, Variant
from pocketvlm.export.targets.coreml_compress import PALETTE_BITS, SMALLEST, compressed_graph, palettize
from pocketvlm.export.targets.onnx_ladder import weights_to_int8

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

ONNX = ("fp16", "w8", "w8a8-dynamic", "w8a8-static", "w4")
EXECUTORCH = ("w8a8-dynamic", "w8a8-static", "w4")
COREML = ("w8", "palette8", "palette6", "palette4", "w8a8-static")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def towers() -> Towers:
    found: Towers = toy.toy_towers()
    return found


Lowered = dict[tuple[str, str], tuple[Path, Variant]]


@pytest.fixture(scope="module")
def lowered(towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """Every rung that `test_targets.py` does not lower, once."""
    folder = tmp_path_factory.mktemp("bundle")
    calibration = toy.toy_calibration()
    found = {}
    for name, precisions in (("onnx", ONNX), ("executorch", EXECUTORCH), ("coreml", COREML)):
        for precision in precisions:
            how: Any = {"precision": precision, "folder": folder, "calibration": calibration}
            found[name, precision] = (folder, get_target(name).lower(towers, **how))
    return found


def rows_of(tower: str, count: int, seed: int = 7) -> Any:
    return toy.pictures(count, seed) if tower == "image" else toy.sentences(count, seed)


def run(found: tuple[Path, Variant], name: str, tower: str, rows: Any) -> Any:
    backend = open_backend(name, found[0], found[1])
    return backend.run_image(rows) if tower == "image" else backend.run_text(rows)


def module_of(towers: Towers, tower: str) -> nn.Module:
    module = towers.image if tower == "image" else towers.text
    assert module is not None
    return module


# --- the vocabulary -------------------------------------------------------------------------------------------------


def test_one_vocabulary_everywhere() -> None:
    assert set(PRECISION_ORDER) == set(PRECISIONS) == set(DEFAULT_TOLERANCE) == set(load_budgets().precisions)
    assert set(PRECISIONS) >= CALIBRATED
    for name in list_targets():
        target = get_target(name)
        assert set(target.defaults) <= set(target.precisions)
        assert set(target.precisions).isdisjoint(target.refused)
        assert set(target.precisions) | set(target.refused) == set(PRECISIONS), name


@pytest.mark.parametrize("name", ["onnx", "executorch", "coreml"])
def test_what_a_target_cannot_write_is_refused_with_what_it_can(name: str, towers: Towers, tmp_path: Path) -> None:
    target = get_target(name)
    for precision, reason in target.refused.items():
        with pytest.raises(UsageError) as caught:
            target.lower(towers, precision=precision, folder=tmp_path, calibration=None)  # type: ignore[arg-type]
        message = str(caught.value)
        assert f"({reason}), only {', '.join(target.precisions)}" in message
        assert len(reason) > 20
    for precision in CALIBRATED & set(target.precisions):
        with pytest.raises(UsageError, match=f"{precision} without calibration data"):
            target.lower(towers, precision=precision, folder=tmp_path, calibration=None)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="did you mean 'w8a8-static'"):
        target.lower(towers, precision="w8a8static", folder=tmp_path, calibration=None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_floors_are_those_of_the_budgets() -> None:
    assert floor_of("w8").mean == pytest.approx(0.999)
    assert (floor_of("w8a8-static").mean, floor_of("w8a8-static").p1) == pytest.approx((0.99, 0.98))
    assert (floor_of("w4").mean, floor_of("w4").p1) == pytest.approx((0.97, -1))
    assert floor_of("fp16").minimum == pytest.approx(1 - 1e-4)


# --- every file -----------------------------------------------------------------------------------------------------


def cases() -> list[tuple[str, str]]:
    return [("onnx", p) for p in ONNX] + [("executorch", p) for p in EXECUTORCH]


@pytest.mark.parametrize(("name", "precision"), cases())
@pytest.mark.parametrize("tower", ["image", "text"])
def test_every_rung_meets_its_floor_on_unseen_inputs(
    lowered: Lowered, towers: Towers, name: str, precision: str, tower: str
) -> None:
    rows = rows_of(tower, 60)
    found = run(lowered[name, precision], name, tower, rows)
    assert found.dtype == np.float32
    expected = run_module(copy.deepcopy(module_of(towers, tower)).double(), rows)
    result, floor = fidelity(found, expected), floor_of(precision)
    assert result.mean >= floor.mean
    assert result.p1 >= floor.p1
    assert result.minimum >= floor.minimum
    assert result.mean < 1 - 1e-9, "a file that equals float32 is not rounded"
    notes: Any = lowered[name, precision][1].notes[tower]
    assert notes["meets_floor"] is True
    assert notes["scheme"]


def sizes(lowered: Lowered, name: str, tower: str) -> dict[str, int]:
    return {p: (folder / v.files[tower]).stat().st_size for (n, p), (folder, v) in lowered.items() if n == name}


def test_fewer_bits_are_smaller_files(lowered: Lowered) -> None:
    found = sizes(lowered, "onnx", "text")
    assert found["w4"] < 0.75 * found["w8"] < 0.75 * 0.75 * found["fp16"]
    found = sizes(lowered, "executorch", "text")
    assert found["w4"] < 0.75 * found["w8a8-dynamic"]


# --- ONNX -----------------------------------------------------------------------------------------------------------


def graph_of(found: tuple[Path, Variant], tower: str) -> Any:
    return onnx.load(str(found[0] / found[1].files[tower]))


def kinds(model: Any) -> dict[str, int]:
    names = [node.op_type for node in model.graph.node]
    return {name: names.count(name) for name in set(names)}


def test_half_precision_computes_in_half_and_keeps_its_interface(lowered: Lowered) -> None:
    for tower in ("image", "text"):
        model = graph_of(lowered["onnx", "fp16"], tower)
        assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        constants = [numpy_helper.to_array(entry) for entry in model.graph.initializer]
        assert not [c for c in constants if c.dtype == np.float32 and c.size > 64]
        names = {node.output[0]: node for node in model.graph.node}
        softmax = [node for node in model.graph.node if node.op_type == "Softmax"]
        assert bool(softmax) == (tower == "text")
        for node in softmax:
            before = names[node.input[0]]
            assert before.op_type == "Cast"
            assert before.attribute[0].i == onnx.TensorProto.FLOAT


def test_weight_only_keeps_activations_in_float(lowered: Lowered) -> None:
    for tower in ("image", "text"):
        found = kinds(graph_of(lowered["onnx", "w8"], tower))
        assert found["Cast" if tower == "image" else "DequantizeLinear"] > 0
        assert not {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"} & set(found)


@pytest.mark.parametrize("precision", ["w8", "w4", "w8a8-dynamic"])
def test_integer_weights_of_convolutions_are_float_before_the_first_run(
    lowered: Lowered, precision: str, tmp_path: Path
) -> None:
    """onnxruntime keeps a DequantizeLinear for every run, and the convolution behind it has no constant weight to lay
    out for its kernel: two to three times the time of float32."""
    import onnxruntime

    folder, variant = lowered["onnx", precision]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(str(folder / variant.files["image"]), options, providers=["CPUExecutionProvider"])
    stored = graph_of(lowered["onnx", precision], "image")
    assert [e for e in stored.graph.initializer if e.data_type == onnx.TensorProto.INT8 and len(e.dims) == 4]
    graph = onnx.load(str(tmp_path / "loaded.onnx")).graph
    constants = {entry.name for entry in graph.initializer}
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "FusedConv")]
    assert len(convolutions) == 4
    assert all(node.input[1] in constants for node in convolutions)


def test_dynamic_and_static_are_what_they_say(lowered: Lowered) -> None:
    for tower in ("image", "text"):
        dynamic = kinds(graph_of(lowered["onnx", "w8a8-dynamic"], tower))
        assert dynamic["DynamicQuantizeLinear"] > 0
        assert "QuantizeLinear" not in dynamic
        static = kinds(graph_of(lowered["onnx", "w8a8-static"], tower))
        assert static["QuantizeLinear"] > 0
        assert "DynamicQuantizeLinear" not in static
    model = graph_of(lowered["onnx", "w8a8-static"], "text")
    made = {node.output[0]: node.op_type for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type in ("Softmax", "LayerNormalization"):
            assert made.get(node.input[0]) != "DequantizeLinear", "softmax and LayerNorm read float"


def test_four_bits_in_blocks_of_32(lowered: Lowered, towers: Towers) -> None:
    model = graph_of(lowered["onnx", "w4"], "text")
    linears = [m for m in module_of(towers, "text").modules() if isinstance(m, nn.Linear)]
    found = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(found) == len(linears)
    for node in found:
        attributes = {a.name: a.i for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"]) == (4, 32)
    rows = toy.VOCAB
    tables = [numpy_helper.to_array(e) for e in model.graph.initializer if rows in e.dims]
    assert sorted((t.dtype.name, t.shape[1]) for t in tables) == [("float16", 1), ("uint8", 16)]


def test_without_calibration_data_biases_stay_and_the_notes_say_so(towers: Towers, tmp_path: Path) -> None:
    only_text = Towers(None, towers.text, towers.contract)
    variant = get_target("onnx").lower(only_text, precision="w8", folder=tmp_path, calibration=None)
    notes: Any = variant.notes["text"]
    assert notes == {"scheme": "weights-per-channel", "biases": "as they were, for want of calibration data"}
    rows = rows_of("text", 20)
    expected = run_module(module_of(towers, "text"), rows)
    assert fidelity(run((tmp_path, variant), "onnx", "text", rows), expected).mean > 0.999


def test_weights_are_rounded_per_output_channel() -> None:
    """Against a loop over channels, for both layouts of a linear layer and for a convolution."""
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.normal(size=(24, 16)).astype(np.float32) * np.linspace(0.01, 5, 16, dtype=np.float32),
        "b": rng.normal(size=(16, 24)).astype(np.float32) * np.linspace(0.01, 5, 16, dtype=np.float32)[:, None],
        "c": rng.normal(size=(12, 8, 3, 3)).astype(np.float32),
        "small": rng.normal(size=(4, 4)).astype(np.float32),
    }
    make = onnx.helper.make_node
    nodes = [
        make("MatMul", ["x", "a"], ["1"]), make("Gemm", ["x", "b"], ["2"], transB=1),
        make("Conv", ["y", "c"], ["3"]), make("Conv", ["y", "c"], ["4"]), make("MatMul", ["z", "small"], ["5"]),
    ]  # fmt: skip
    initializers = [numpy_helper.from_array(v, k) for k, v in weights.items()]
    output = [onnx.helper.make_tensor_value_info(str(i), 1, None) for i in range(1, 6)]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], output, initializers))
    assert weights_to_int8(model, float_convolutions=1) == 3
    stored = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    assert {"c", "small"} <= set(stored)
    assert not {"a", "b"} & set(stored)
    by_input = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    readers = {node.output[0]: node.input[1] for node in model.graph.node if node.output[0] in "12345"}
    assert readers["3"] == "c"
    by_output = {node.output[0]: node for node in model.graph.node}
    for key, name, axis in (("1", "a", 1), ("2", "b", 0), ("4", "c", 0)):
        if key == "4":
            node = by_output[readers[key]]
            cast = by_output[node.input[0]]
            assert (node.op_type, cast.op_type) == ("Mul", "Cast")
            levels, scale = stored[cast.input[0]], stored[node.input[1]]
            assert scale.shape == (12, 1, 1, 1)
            scale = scale.ravel()
        else:
            node = by_input[readers[key]]
            levels, scale = stored[node.input[0]], stored[node.input[1]]
            assert node.attribute[0].i == axis
        assert levels.dtype == np.int8
        for channel in range(weights[name].shape[axis]):
            values = np.take(weights[name], channel, axis)
            step = np.abs(values).max() / 127
            assert scale[channel] == pytest.approx(step, rel=1e-6)
            assert np.abs(np.take(levels, channel, axis) * scale[channel] - values).max() <= 0.5001 * step


# --- ExecuTorch -----------------------------------------------------------------------------------------------------


def test_executorch_keeps_depthwise_convolutions_in_float_where_ranges_are_dynamic() -> None:
    from pocketvlm.export.targets.executorch import _convert
    from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer

    source = prepare.capture(toy.toy_towers().image, toy.pictures(16))
    prepare.fold_batchnorm(source)
    graph: Any = _convert(source, TowerQuantizer(0, "rows"), toy.pictures(2))
    found = []
    for node in graph.graph.nodes:
        if node.op == "call_function" and "conv2d" in str(node.target):
            found.append(
                ("dequantize_per_channel" in str(node.args[1].target), "per_tensor.tensor" in str(node.args[0].target))
            )
    assert found == [(True, True), (False, False), (True, True), (True, True)], "the second is depthwise"


@pytest.mark.parametrize("bias", [True, False])
def test_executorch_rounds_to_the_values_that_torchao_stores(bias: bool) -> None:
    """Biases are corrected for `round_blocks_evenly`; torchao's own weights differ where a value lies half-way."""
    from pocketvlm.export.targets.executorch import _quantize_blocks

    torch.manual_seed(0)
    layer = nn.Linear(64, 24, bias)
    graph = prepare.capture(nn.Sequential(layer).eval(), np.zeros((2, 64), np.float32))
    _quantize_blocks(graph)
    (stored,) = [m for m in graph.modules() if isinstance(m, nn.Linear)]
    weight: Any = stored.weight
    difference = (weight.dequantize() - rounding.round_blocks_evenly(layer.weight.detach())).abs()
    assert float((difference > 1e-4).float().mean()) < 0.05
    assert (
        float((weight.dequantize() - rounding.round_blocks(layer.weight.detach())).abs().gt(1e-4).float().mean()) > 0.5
    )


# --- Core ML --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", COREML)
def test_coreml_stores_exactly_the_weights_that_were_judged(lowered: Lowered, towers: Towers, precision: str) -> None:
    """The package, read back from disk, expands to the rounded graph's weights."""
    folder, variant = lowered["coreml", precision]
    calibration = toy.toy_calibration()
    for tower, rows in (("image", calibration.pixels), ("text", calibration.ids)):
        ready = prepare.Prepared(module_of(towers, tower), rows)
        graph, _ = compressed_graph(module_of(towers, tower), ready, rows[:2], precision)
        _, program = load_package(folder / variant.files[tower])
        stored = list(_constants(next(iter(program.functions.values()))).values())
        expected = [p.detach().numpy() for p in (*graph.parameters(), *graph.buffers()) if p.numel() >= SMALLEST]
        assert len(expected) == {"image": 2, "text": 2}[tower]
        for value in expected:
            same = [s for s in stored if s.size == value.size and s.dtype.kind == "f"]
            assert min(float(np.abs(s.reshape(value.shape) - value).max()) for s in same) <= 1e-3 * np.abs(value).max()
            if precision in PALETTE_BITS:
                assert len(np.unique(value)) <= 2 ** PALETTE_BITS[precision]
        notes: Any = variant.notes[tower]
        assert notes["meets_floor"] is True
        assert notes["held_out_by"] == (
            "coreml-mil" if precision == "w8a8-static" else "the rounded weights in eager float32"
        )
        assert ("constexpr_lut_to_dense" in notes["kinds"]) == (precision in PALETTE_BITS)
        assert ("constexpr_affine_dequantize" in notes["kinds"]) == (precision in ("w8", "w8a8-static"))
        assert ("quantize" in notes["kinds"]) == (precision == "w8a8-static")


def test_coreml_takes_the_ranges_of_activations_from_the_calibration_inputs(lowered: Lowered, towers: Towers) -> None:
    """Each `quantize` before a layer spans about what reaches it from these inputs."""
    folder, variant = lowered["coreml", "w8a8-static"]
    calibration = toy.toy_calibration()
    for tower, rows in (("image", calibration.pixels), ("text", calibration.ids)):
        spec, quantized = load_package(folder / variant.files[tower])
        (entry,) = spec.description.input
        fit = prepare.Prepared(module_of(towers, tower), rows).fit
        seen = _ranges(MilProgram(quantized.functions["main"]), entry, fit)
        found = [op for op in quantized.functions["main"].operations if op.op_type == "quantize"]
        kinds = ("conv", "linear")
        layers = [op for kind in kinds for op in quantized.functions["main"].operations if op.op_type == kind]
        stem = [op for op in layers if op.op_type == "conv"][:STEM_LAYERS]
        assert len(layers) > len(stem)
        for layer in layers:
            before = layer.inputs["x"].op
            assert (before is not None and before.op_type == "dequantize") == (layer not in stem), layer.name
        for op in found:
            low, high = seen[op.inputs["input"].name]
            # what comes before is rounded too, so the ends are not quite those that were measured
            assert float(op.inputs["scale"].val) == pytest.approx((high - low) / 255, rel=0.1), op.inputs["input"].name


def _ranges(program: MilProgram, entry: Any, rows: Any) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {}

    def see(_: str, name: str, value: Any) -> None:
        if value.is_floating_point():
            low, high = seen.get(name, [0.0, 0.0])
            seen[name] = [min(low, float(value.min())), max(high, float(value.max()))]

    for start in range(len(rows)):
        program.run({entry.name: as_input(entry, rows[start : start + 1])}, see)
    return seen


def test_coreml_packs_palettes_tightly(lowered: Lowered) -> None:
    def stored(precision: str) -> int:
        folder, variant = lowered["coreml", precision]
        return sum(f.stat().st_size for f in (folder / variant.files["text"]).rglob("weight.bin"))

    rows, width = toy.VOCAB, 32
    # the token table alone sheds a quarter of its bytes from 8 to 6 bits and half of them from 8 to 4
    assert stored("palette8") - stored("palette6") == pytest.approx(rows * width / 4, rel=0.1)
    assert stored("palette8") - stored("palette4") == pytest.approx(rows * width / 2, rel=0.1)


def test_palettes_are_as_good_as_an_exhaustive_search() -> None:
    """k-means in one dimension against the best of all partitions of a short sorted list (dynamic programming)."""
    rng = np.random.default_rng(4)
    values = np.sort(np.concatenate([rng.normal(c, 0.05, 20) for c in (-2, -0.5, 0, 1.5)])).astype(np.float16)
    exact = values.astype(np.float64)
    best = np.full((5, len(exact) + 1), np.inf)
    best[0, 0] = 0.0
    for used in range(1, 5):
        for end in range(1, len(exact) + 1):
            for start in range(end):
                part = exact[start:end]
                cost = best[used - 1, start] + float(((part - part.mean()) ** 2).sum())
                best[used, end] = min(best[used, end], cost)
    found = palettize(torch.from_numpy(exact).float(), 2).double().numpy()
    assert len(np.unique(found)) == 4
    assert float(((found - exact) ** 2).sum()) <= 1.02 * best[4, -1] + 1e-6
    torch.manual_seed(0)
    normal = torch.randn(300, 100)
    for bits in (4, 6, 8):
        # the least error that 2^bits values can have on a normal distribution (Panter and Dite), and a quarter
        error = float((palettize(normal, bits) - normal).square().mean())
        assert error <= 1.25 * 3**0.5 * np.pi / 2 / 4**bits
    few = torch.tensor([[0.5, -1.0], [0.5, 3.0]])
    assert torch.equal(palettize(few, 4), few)


# --- preparation ----------------------------------------------------------------------------------------------------


def test_four_bit_table_against_a_loop() -> None:
    torch.manual_seed(2)
    weight = torch.randn(300, 64)
    weight[7] = 0.0
    table = token_tables.Int4Embedding(weight)
    assert (table.table.dtype, tuple(table.table.shape)) == (torch.uint8, (300, 32))
    found = table(torch.arange(300).reshape(3, 100)).reshape(300, 64)
    for row in range(0, 300, 7):
        for start in (0, 32):
            block = weight[row, start : start + 32]
            extreme = float(block[block.abs().argmax()])
            step = np.float16(extreme / -8)
            for at in range(32):
                exact = float(block[at])
                level = 0 if step == 0 else int(np.clip(np.round(exact / np.float32(step)), -8, 7))
                assert float(found[row, start + at]) == pytest.approx(level * float(step), abs=1e-6)


def test_only_tables_whose_width_fits_get_four_bits() -> None:
    wide, odd, small = nn.Embedding(300, 64), nn.Embedding(300, 40), nn.Embedding(20, 64)
    module = token_tables.quantize_tables(nn.ModuleList([wide, odd, small]), 4)
    assert [type(m).__name__ for m in module] == ["Int4Embedding", "Int8Embedding", "Embedding"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("zero_point", [True, False])
def test_blocks_of_a_weight_against_a_loop(zero_point: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, 72) + 0.3  # the last block is a short one
    found = (rounding.round_blocks if zero_point else rounding.round_blocks_evenly)(weight)
    assert found.shape == weight.shape
    for row in range(5):
        for start in (0, 32, 64):
            block = [float(v) for v in weight[row, start : start + 32]]
            low, high = min(0.0, *block), max(0.0, *block)
            step = (high - low) / 15 if zero_point else max(-min(block), max(block)) / 7.5
            for at, value in enumerate(block):
                if abs(abs(value / step) % 1 - 0.5) < 1e-5:
                    continue  # half-way, where the last bit of the division decides; the extreme of a block is
                if zero_point:
                    zero = round(-low / step)
                    exact = (min(15, max(0, round(value / step) + zero)) - zero) * step
                else:
                    exact = min(7, max(-8, round(value / step))) * step
                assert float(found[row, start + at]) == pytest.approx(exact, abs=1e-5)


def test_biases_are_corrected_for_the_rounding_that_ships() -> None:
    """The mean output that weight rounding shifted comes back, and comes back less for another rounding."""
    towers = toy.toy_towers()
    rows = toy.sentences(48, 5)
    ready = prepare.Prepared(towers.text, toy.sentences(64, 3))
    plain = prepare.capture(towers.text, rows)
    truth = prepare.mean_outputs(plain, rows)

    def shift(chosen: prepare.Rounding) -> float:
        graph = ready.rounded(chosen, 4)
        for node in graph.graph.nodes:
            if node.target in prepare.LINEARS:
                owner: Any = graph
                *path, last = str(node.args[1].target).split(".")
                for part in path:
                    owner = getattr(owner, part)
                getattr(owner, last).data.copy_(rounding.round_blocks(getattr(owner, last).data))
        found = prepare.mean_outputs(graph, rows)
        assert set(found) == set(truth)
        return max(float((found[name] - truth[name]).abs().max()) for name in truth)

    own = shift(prepare.Rounding(rounding.round_blocks, "none"))
    other = shift(prepare.Rounding(rounding.round_weight, "none"))
    assert own < 0.5 * other


def test_every_budget_row_has_its_sources() -> None:
    shipped = load_budgets()
    for precision in PRECISIONS:
        assert all(len(b.source) > 10 for b in shipped.for_precision(precision).metrics.values())


def test_a_class_token_does_not_stop_int8_weights(towers: Towers, tmp_path: Path) -> None:
    """It joins the patches in a list of values, which coremltools cannot look into for constants of any size."""
    import timm

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            size, width = toy.SIZE, towers.contract.embed_dim
            self.vit = timm.create_model(
                "vit_tiny_patch16_224", img_size=size, patch_size=size // 4, depth=1, embed_dim=64, num_heads=2,
                num_classes=width,
            )  # fmt: skip

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(self.vit(pixels.permute(0, 3, 1, 2).float() / 255), dim=-1)

    alone = dataclasses.replace(towers, image=Vit().eval(), text=None)
    how: Any = {"precision": "w8", "folder": tmp_path, "calibration": toy.toy_calibration()}
    variant = get_target("coreml").lower(alone, **how)
    notes: Any = variant.notes["image"]
    assert notes["held_out_cosine_mean"] > 0.999
    assert "constexpr_affine_dequantize" in notes["kinds"]
