"""What keeps int8 small and fast: depthwise convolutions, GELU as one operator, large weights of float convolutions."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.export import prepare, static
from pocketvlm.export.depthwise import make_depthwise
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.prepare import Prepared
from pocketvlm.export.static import Settings, build, search, simulate
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.base import Calibration, Towers
from pocketvlm.export.targets.onnx import export_graph, run_file
from pocketvlm.export.targets.onnx_gelu import fuse_gelu, gelu_sums, reorder_gelu

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Doubling(nn.Module):
    """As FastViT: a large first convolution, one with two outputs for each input channel, GELU, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(3, 16, 8, 2, 3)
        self.small = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.twice = nn.Conv2d(16, 32, 3, 2, 1, groups=16)
        self.behind = nn.Conv2d(32, 24, 1)
        self.expand, self.shrink = nn.Conv2d(24, 48, 1), nn.Conv2d(48, 24, 1)
        self.last = nn.Conv2d(24, 48, 3, 1, 1, groups=24)
        self.head = nn.Linear(48, 32)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.gelu(self.stem(pixels.permute(0, 3, 1, 2).to(self.head.weight.dtype) / 255 - 0.5))
        x = F.gelu(self.behind(self.twice(self.point(self.small(x)))))
        x = x + self.shrink(F.gelu(self.expand(x)))
        x = self.last(x)
        return F.normalize(self.head(F.adaptive_avg_pool2d(x * x.sigmoid(), 1).flatten(1)), dim=-1)


@pytest.fixture(scope="module")
def doubling() -> nn.Module:
    return Doubling().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def int8(doubling: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The float file and the int8 file."""
    folder = tmp_path_factory.mktemp("doubling")
    towers = Towers(doubling, None, toy.toy_towers().contract)
    calibration = Calibration(toy.pictures(64, 100), np.zeros((0, 1), np.int32), "toy pictures")
    files = []
    for precision in ("fp32", "int8"):
        variant = get_target("onnx").lower(towers, precision=precision, folder=folder, calibration=calibration)
        files.append(folder / variant.files["image"])
    return files[0], files[1]


def convolutions(graph: Any) -> list[Any]:
    return [node for node in graph.graph.nodes if node.target in prepare.CONVOLUTIONS]


def test_several_outputs_of_a_group_become_depthwise_and_compute_the_same(doubling: nn.Module) -> None:
    graph = prepare.capture(doubling, toy.pictures(4))
    names = [node.name for node in convolutions(graph)]
    assert make_depthwise(graph) == 1
    assert [node.name for node in convolutions(graph)] == names, "biases are corrected by these names"
    shapes = [
        (tuple(node.args[1].meta["val"].shape), node.args[6]) for node in convolutions(graph) if len(node.args) > 6
    ]
    assert ((32, 1, 3, 3), 32) in shapes
    assert ((48, 1, 3, 3), 24) in shapes, "what others than one convolution read keeps its channels' order"
    rows = toy.pictures(8, 9)
    expected = run_module(copy.deepcopy(doubling).double(), rows)
    np.testing.assert_allclose(run_module(graph, rows), expected, atol=2e-6)
    assert make_depthwise(graph) == 0


def test_channels_go_where_the_formula_says() -> None:
    """By a loop over groups and outputs, without the convolution."""
    torch.manual_seed(0)
    wide, behind = nn.Conv2d(3, 9, 1, groups=3), nn.Conv2d(9, 2, 1)
    module = nn.Sequential(wide, behind).eval().requires_grad_(False)
    example = np.random.default_rng(0).normal(size=(2, 3, 1, 1)).astype(np.float32)
    graph = prepare.capture(module, example)
    assert make_depthwise(graph) == 1
    x = torch.from_numpy(example[0, :, 0, 0]).double()
    out = behind.bias.double().clone()  # type: ignore[union-attr]
    for group in range(3):
        for output in range(3):
            channel = 3 * group + output
            value = wide.weight[channel, 0, 0, 0].double() * x[group] + wide.bias[channel]  # type: ignore[index]
            out += behind.weight[:, channel, 0, 0].double() * value
    np.testing.assert_allclose(run_module(graph, example)[0, :, 0, 0], out.numpy(), atol=1e-6)


def exported(module: nn.Module, path: Path) -> Any:
    export_graph(module, toy.pictures(2), "image", path, contract_digest="0" * 64)
    return onnx.load(str(path))


def test_the_float_file_runs_gelu_as_one_operator_and_pools_by_one(int8: tuple[Path, Path], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(str(int8[0]), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "loaded.onnx")).graph.node]
    assert kinds.count("Gelu") == 3
    assert "Erf" not in kinds
    kinds = [node.op_type for node in onnx.load(str(int8[0])).graph.node]
    assert kinds.count("ReduceMean") == 1
    assert not {"Range", "Gather"} & set(kinds), "the pooled map is not copied into another layout"


def test_reordering_changes_no_bit_and_fusing_none_that_counts(doubling: nn.Module, tmp_path: Path) -> None:
    model = exported(doubling, tmp_path / "model.onnx")
    rows = toy.pictures(4, 5)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def run(changed: Any) -> Any:
        session = onnxruntime.InferenceSession(changed.SerializeToString(), options)
        return session.run(None, {"pixels": rows})[0]

    before = copy.deepcopy(model)
    for node in before.graph.node:  # as the exporter writes it: x * (0.5 * (1 + erf))
        if node.name in gelu_sums(before.graph):
            (inner,) = [n for n in before.graph.node if node.output[0] in n.input]
            (outer,) = [n for n in before.graph.node if inner.output[0] in n.input]
            x, half = inner.input[0], outer.input[1]
            inner.input[:], outer.input[:] = [half, node.output[0]], [x, inner.output[0]]
    np.testing.assert_array_equal(run(before), run(model))
    assert reorder_gelu(before) == 3
    assert [list(n.input) for n in before.graph.node] == [list(n.input) for n in model.graph.node]
    fused = copy.deepcopy(model)
    assert fuse_gelu(fused) == 3
    assert not gelu_sums(fused.graph)
    np.testing.assert_allclose(run(fused), run(model), atol=1e-6)


def test_what_is_no_gelu_is_left_alone() -> None:
    make = onnx.helper.make_node
    chain = [
        make("Div", ["x", "root"], ["d"]), make("Erf", ["d"], ["e"]), make("Add", ["e", "one"], ["a"], "sum"),
        make("Mul", ["half", "a"], ["m"]), make("Mul", ["other", "m"], ["y"]),
    ]  # fmt: skip
    graph = onnx.helper.make_graph(chain, "g", [], [])
    assert gelu_sums(graph) == [], "another value than x is gated"
    chain[-1].input[0] = "x"
    graph = onnx.helper.make_graph([*chain, make("Relu", ["a"], ["z"])], "g", [], [])
    assert gelu_sums(graph) == [], "somebody else reads the sum"
    assert gelu_sums(onnx.helper.make_graph(chain, "g", [], [])) == ["sum"]


def test_the_int8_file_has_no_slow_operators_and_stays_close(int8: tuple[Path, Path]) -> None:
    graph = onnx.load(str(int8[1])).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Gelu") == 3
    assert "Erf" not in kinds, "its sums would be rounded to 8 bits"
    made = {name: node for node in graph.node for name in node.output}
    stored = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}

    def levels(node: Any) -> Any:
        name = node.input[1]
        while name not in stored:
            name = made[name].input[0]
        return stored[name]

    grouped = {}
    for node in graph.node:
        if node.op_type == "Conv":
            (group,) = [a.i for a in node.attribute if a.name == "group"] or [1]
            grouped[levels(node).shape] = (group, levels(node).dtype)
    assert grouped[32, 1, 3, 3] == (32, np.int8)
    assert grouped[16, 3, 8, 8] == (1, np.int8), "computed in float, stored as int8"
    assert grouped[16, 1, 3, 3] == (16, np.float32), "small, and at the input"
    rows = toy.pictures(32, 7)
    float_rows, rounded = (run_file(path, rows, "image", 1) for path in int8)
    assert fidelity(rounded, float_rows).mean > 0.999


def test_biases_are_corrected_for_stored_weights_and_executorch_has_them_too(doubling: nn.Module) -> None:
    pytest.importorskip("executorch.exir")
    from pocketvlm.export.rounding import round_kernels
    from pocketvlm.export.targets.executorch import _convert
    from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer

    ready = Prepared(doubling, toy.pictures(64, 100))
    chosen = build(ready, Settings())
    first = convolutions(chosen.graph)[0]
    weight, bias = (chosen.graph.get_parameter(str(first.args[at].target)).detach() for at in (1, 2))
    assert "corrected_bias" in str(first.args[2].target)
    x = torch.from_numpy(ready.fit).permute(0, 3, 1, 2).float() / 255 - 0.5
    module: Any = doubling
    exact = F.conv2d(x, weight, module.stem.bias, 2, 3).mean((0, 2, 3))
    found = F.conv2d(x, round_kernels(weight), bias, 2, 3).mean((0, 2, 3))
    uncorrected = F.conv2d(x, round_kernels(weight), module.stem.bias, 2, 3).mean((0, 2, 3))
    assert (found - exact).abs().max() < 0.05 * (uncorrected - exact).abs().max()
    converted: Any = _convert(copy.deepcopy(chosen.graph), TowerQuantizer(3, steps=chosen.steps), ready.fit[:2])
    lowered = convolutions(converted)[0]
    np.testing.assert_array_equal(converted.get_parameter(str(lowered.args[1].target)).detach(), round_kernels(weight))
    expected = run_module(doubling, toy.pictures(16, 9))
    assert fidelity(simulate(chosen, toy.pictures(16, 9)), expected).mean > 0.999


def test_a_patch_embedding_is_stored_as_int8(tmp_path: Path) -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.patch, self.qkv, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, pixels: Tensor) -> Tensor:
            x = self.patch(pixels.permute(0, 3, 1, 2).float() / 255 - 0.5).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).unflatten(-1, (3, 1, 32)).permute(2, 0, 3, 1, 4).unbind(0)
            return F.normalize(self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1)), dim=-1)

    towers = Towers(Patches().eval().requires_grad_(False), None, toy.toy_towers().contract)
    assert towers.contract.image == ImageSpec(size=toy.SIZE)
    calibration = toy.toy_calibration()
    for precision in ("int8", "w4", "w8"):
        variant = get_target("onnx").lower(towers, precision=precision, folder=tmp_path, calibration=calibration)  # type: ignore[arg-type]
        graph = onnx.load(str(tmp_path / variant.files["image"])).graph
        shapes = [(tuple(e.dims), e.data_type) for e in graph.initializer if list(e.dims)[2:] == [8, 8]]
        assert shapes == [((32, 3, 8, 8), onnx.TensorProto.INT8)], precision
        notes: Any = variant.notes["image"]
        assert notes["held_out_cosine_mean"] > (0.9999 if precision != "w4" else 0.99), precision


def test_more_layers_stay_in_float_only_where_that_helps_much(
    doubling: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are made up: two layers lose a tenth less than one, three lose half."""
    lost = {1: 1.0, 2: 0.9, 3: 0.5}
    monkeypatch.setattr(static, "STEM_LAYERS", 1)
    monkeypatch.setattr(static, "simulate", lambda one, rows: np.full((2, 2), one.settings.stem))
    monkeypatch.setattr(static, "_loss", lambda stem: lost[int(stem)])

    class Result(int):
        comfortable, meets_floor = False, True

    monkeypatch.setattr(static, "fidelity", lambda rows, expected: Result(rows[0, 0]))
    ready = Prepared(doubling, toy.pictures(16, 100))
    monkeypatch.setattr(static, "build", lambda ready, settings: static.Static(None, {}, settings))  # type: ignore[arg-type]
    monkeypatch.setattr(
        static, "Settings", lambda observer="minmax", alpha=None, stem=1: Settings(observer, alpha, stem)
    )
    monkeypatch.setattr(static, "STEMS", (1, 2))
    assert search(ready).settings.stem == 1
    monkeypatch.setattr(static, "STEMS", (1, 2, 3))
    assert search(ready).settings.stem == 3
    monkeypatch.setattr(static, "STEMS", (1, 2))
    monkeypatch.setattr(Result, "meets_floor", False)
    assert search(ready).settings.stem == 2, "what misses the floor is not worth keeping"
