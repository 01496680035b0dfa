"""Fine-tuning with fake quantization: the integers that were trained are the integers that ship."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pocketvlm.edge.backends import open_backend
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.export import finetune as module
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.fake_quant import FakeQuantized, Step, _Grid
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.finetune import Finetune, finetune_towers
from pocketvlm.export.prepare import round_weights
from pocketvlm.export.source import Exportable
from pocketvlm.export.static import static_tower
from pocketvlm.export.stems import is_stored
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.base import Calibration, Towers, Variant
from pocketvlm.export.targets.onnx import ROUNDINGS, prepared_tower
from pocketvlm.export.targets.onnx_steps import tensor_overrides
from pocketvlm.export.tuned import Trained, Tuned, trained

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

FEW = Finetune(steps=8, batch=16, rate=2e-4, seed=3)


class ImageViT(nn.Module):
    """Patches, one block of attention, a layer norm before every linear layer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 6, 6)
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.projection = nn.Linear(width, toy.DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.permute(0, 3, 1, 2).to(self.projection.weight.dtype) - 127.5) / 127.5
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out((q @ k.transpose(-2, -1) * x.shape[-1] ** -0.5).softmax(-1) @ v)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.last(x))))
        return torch.nn.functional.normalize(self.projection(x.mean(1)), dim=-1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vit_towers() -> Towers:
    torch.manual_seed(1)
    return Towers(ImageViT().eval().requires_grad_(False), None, toy.toy_towers().contract)


def text_only() -> Towers:
    towers: Towers = toy.toy_towers()
    return Towers(None, towers.text, towers.contract)


Made = tuple[Towers, Calibration, Path, dict[tuple[str, str], Variant]]
WANTED = (("onnx", "int8"), ("executorch", "int8"))


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Both kinds of student, tuned and lowered once."""
    found = {}
    for name, towers in (("convolutions", toy.toy_towers()), ("vit", vit_towers())):
        calibration, folder = toy.toy_calibration(96), tmp_path_factory.mktemp(name)
        finetune_towers(WANTED, towers, calibration, FEW)
        how: Any = {"folder": folder, "calibration": calibration}
        # lowering a transformer to ExecuTorch takes long, and its integers are looked at before that
        files = {"onnx": towers, "executorch": Towers(towers.image, None, towers.contract)}
        variants = {(t, p): get_target(t).lower(files[t], precision=p, **how) for t, p in WANTED}  # type: ignore[arg-type]
        found[name] = (towers, calibration, folder, variants)
    return found


CASES = [("convolutions", "image"), ("convolutions", "text"), ("vit", "image")]


def result(found: Made, tower: str) -> Trained:
    towers, calibration, _, _ = found
    owner = towers.image if tower == "image" else towers.text
    assert owner is not None
    ready = prepared_tower(owner, calibration, tower)  # type: ignore[arg-type]
    left = trained(ready)
    assert left is not None
    return left


def fake_of(found: Made, tower: str) -> FakeQuantized:
    return result(found, tower).fake_quantized()


def integers(fake: FakeQuantized) -> dict[str, tuple[Any, Any]]:
    """Layer -> (round(w / scale), scale per output channel) of every weight that the files round; a scale for each
    kernel where a convolution computes in float and its kernels are large."""
    found = {}
    for node in fake.graph_module.graph.nodes:
        if fake.rounds_weight(node):
            weight = fake.graph_module.get_parameter(str(node.args[1].target)).detach()
            rows = weight.flatten(0, 1) if is_stored(node) and weight[0, 0].numel() >= 9 else weight
            scale = rows.flatten(1).abs().amax(1) / 127
            levels = torch.round(rows / scale.reshape(-1, *[1] * (rows.ndim - 1))).to(torch.int8).reshape(weight.shape)
            found[node.name] = (levels.numpy(), scale.numpy())
    return found


def rows_of(tower: str, count: int = 48) -> Any:
    return toy.pictures(count, 7) if tower == "image" else toy.sentences(count, 7)


# --- the integers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "tower"), CASES)
def test_onnx_holds_the_trained_integers(lowered: dict[str, Made], student: str, tower: str) -> None:
    made = lowered[student]
    fake = fake_of(made, tower)
    graph = onnx.load(str(made[2] / made[3]["onnx", "int8"].files[tower])).graph
    constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
    stored = [value for value in constants.values() if value.dtype == np.int8 and value.ndim > 1 and len(value) != 2000]
    for name, (levels, _) in integers(fake).items():
        same = [
            index
            for index, value in enumerate(stored)
            if any(v.shape == levels.shape and np.array_equal(v, levels) for v in (value, value.T))
        ]
        assert same, f"{name} is not in the file"
        stored.pop(same[0])
    assert not stored, "the file has integers that were not trained"
    pairs = {
        node.input[0]: (float(constants[node.input[1]]), int(constants[node.input[2]]))
        for node in graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    }
    steps = {(float(np.float32(step.scale)), step.zero) for step in result(made, tower).steps.values()}
    assert set(pairs.values()) == steps


@pytest.mark.parametrize(("student", "tower"), CASES)
def test_executorch_computes_with_the_trained_integers(lowered: dict[str, Made], student: str, tower: str) -> None:
    made = lowered[student]
    from pocketvlm.export.targets.executorch import _quantize

    towers, calibration, _, _ = made
    owner = towers.image if tower == "image" else towers.text
    assert owner is not None
    graph, _ = _quantize(prepared_tower(owner, calibration, tower))  # type: ignore[arg-type]
    fake = fake_of(made, tower)
    constants = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    stored = [v for v in constants.values() if v.dtype == torch.int8 and v.ndim > 1 and len(v) != 2000]
    in_float = {node.name for node in fake.graph_module.graph.nodes if is_stored(node)}
    assert bool(in_float) == (student == "vit")
    for name, (levels, scale) in integers(fake).items():
        if name in in_float:
            values = torch.from_numpy(levels * scale.reshape(*levels.shape[:2], 1, 1))
            assert any(v.shape == values.shape and torch.allclose(v, values, rtol=1e-6) for v in constants.values())
            continue
        same = [i for i, v in enumerate(stored) if v.shape == levels.shape and np.array_equal(v.numpy(), levels)]
        assert same, f"{name} is not in the program"
        stored.pop(same[0])
    assert not stored
    pairs = {
        (node.args[1], node.args[2] + 128)
        for node in graph.graph.nodes  # type: ignore[union-attr]
        if "quantize_per_tensor.default" in str(node.target) and isinstance(node.args[1], float)
    }
    assert pairs == {(step.scale, step.zero) for step in result(made, tower).steps.values()}


@pytest.mark.parametrize(
    ("name", "student", "tower"),
    [*(("onnx", *case) for case in CASES), ("executorch", *CASES[0]), ("executorch", *CASES[2])],
)
def test_the_runtime_computes_what_was_trained(lowered: dict[str, Made], name: str, student: str, tower: str) -> None:
    """onnxruntime to a few values that fall to the other side of a step (2e-6 seen); XNNPACK sets the ranges of linear
    layers by the token and not by the input, which is finer than what was trained (3e-5 seen)."""
    made, rows = lowered[student], rows_of(tower)
    backend = open_backend(name, made[2], made[3][name, "int8"])
    run = backend.run_image if tower == "image" else backend.run_text
    found = np.concatenate([run(rows[i : i + 1]) for i in range(len(rows))])
    expected = run_module(fake_of(made, tower).eval(), rows)
    distance = 1 - fidelity(found, expected).minimum
    assert distance < {"onnx": 1e-5, "executorch": 1e-4}[name]


def test_four_bits_hold_the_trained_blocks(tmp_path: Path) -> None:
    """The very values that were trained: rounding them again, as the file is written, must change none."""
    towers, calibration = text_only(), toy.toy_calibration(96)
    finetune_towers([("onnx", "w4")], towers, calibration, FEW)
    ready = prepared_tower(towers.text, calibration, "text")
    rounding = ROUNDINGS["w4"]
    variant = get_target("onnx").lower(towers, precision="w4", folder=tmp_path, calibration=calibration)
    graph = ready.rounded(rounding, 4)
    again = copy.deepcopy(graph)
    round_weights(again, rounding)
    rows = rows_of("text")
    assert np.abs(run_module(graph, rows) - run_module(again, rows)).max() < 1e-6
    backend = open_backend("onnx", tmp_path, variant)
    # MatMulNBits computes in blocks, and with more inputs at once in another order
    assert 1 - fidelity(backend.run_text(rows), run_module(graph, rows)).minimum < 1e-5
    assert "finetune" in variant.notes["text"]  # type: ignore[operator]


# --- the training -----------------------------------------------------------------------------------------------------


def test_the_held_out_inputs_gain_and_a_second_time_is_the_same() -> None:
    """Rounding 4 bits of the toy loses enough for a few steps to show."""
    graphs = []
    for _ in range(2):
        towers, calibration = text_only(), toy.toy_calibration(96)
        finetune_towers([("onnx", "w4")], towers, calibration, dataclasses.replace(FEW, rate=2e-4, steps=24))
        left = trained(prepared_tower(towers.text, calibration, "text"), ROUNDINGS["w4"])
        assert left is not None
        graphs.append(left)
    notes: Any = graphs[0].notes
    assert notes["kept"]
    assert notes["held_out_1_minus_cosine_after"] < 0.97 * notes["held_out_1_minus_cosine_before"]
    first, second = (dict(left.graph.named_parameters()) for left in graphs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_where_nothing_is_gained_the_files_are_as_they_are_without() -> None:
    towers, calibration = toy.toy_towers(), toy.toy_calibration(96)
    assert towers.image is not None
    plain = prepared_tower(towers.image, calibration, "image")
    before = static_tower(plain)
    # steps that ruin every weight
    finetune_towers([("onnx", "int8")], towers, calibration, dataclasses.replace(FEW, rate=0.5, steps=8))
    ready = prepared_tower(towers.image, calibration, "image")
    left = trained(ready)
    assert left is not None
    assert left.notes["kept"] is False
    assert left.notes["held_out_1_minus_cosine_before"] == left.notes["held_out_1_minus_cosine_after"]
    assert left.steps == before.steps
    plainly = FakeQuantized(copy.deepcopy(before.graph), before.steps, before.settings.stem)
    expected, found = integers(plainly), integers(left.fake_quantized())
    assert expected.keys() == found.keys()
    assert all(np.array_equal(expected[name][0], found[name][0]) for name in expected)


def test_targets_get_the_trained_graph_and_everything_else_what_it_had() -> None:
    towers, calibration = toy.toy_towers(), toy.toy_calibration(96)
    assert towers.image is not None
    plain = prepared_tower(towers.image, calibration, "image")
    rows = toy.pictures(8)
    kept = run_module(static_tower(plain.keeping(("stem.0",))).graph, rows)
    dynamic = run_module(plain.graph(static=False)[0], rows)
    weights = run_module(plain.rounded(ROUNDINGS["w8"]), rows)
    finetune_towers([("executorch", "int8")], towers, calibration, dataclasses.replace(FEW, steps=2))
    ready = prepared_tower(towers.image, calibration, "image")
    assert isinstance(ready, Tuned)
    assert not np.array_equal(*(run_module(static_tower(which).graph, rows) for which in (ready, plain)))
    assert np.array_equal(run_module(ready.graph(static=False)[0], rows), dynamic)
    assert np.array_equal(run_module(ready.rounded(ROUNDINGS["w8"]), rows), weights)
    assert np.array_equal(run_module(static_tower(ready.keeping(("stem.0",))).graph, rows), kept)


def test_gradients_of_a_grid_are_those_of_lsq() -> None:
    """Against equation 3 of the paper, value by value, with its section 2.2 balance."""
    values, scale, zero = [-3.0, -1.1, -0.26, 0.0, 0.74, 1.9, 400.0], 0.5, 2
    x = torch.tensor([values], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    found = _Grid.apply(x, s, zero)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (found * weights).sum().backward()
    to_scale = 0.0
    for index, value in enumerate(values):
        ratio = value / scale
        if ratio <= -zero:
            step, passes = -zero, ratio == -zero
        elif ratio >= 255 - zero:
            step, passes = 255 - zero, False
        else:
            step, passes = round(ratio), True
        assert found[0, index].item() == pytest.approx(step * scale)
        assert x.grad is not None
        assert x.grad[0, index].item() == (index + 1.0 if passes else 0.0)
        to_scale += (index + 1) * (step - (ratio if passes else 0))
    assert s.grad is not None
    assert s.grad.item() == pytest.approx(to_scale / (7 * 255) ** 0.5)


def test_a_range_never_grows_beyond_its_clamp() -> None:
    towers, calibration = toy.toy_towers(), toy.toy_calibration()
    static = static_tower(prepared_tower(towers.image, calibration, "image"))
    fake = FakeQuantized(static.graph, static.steps, static.settings.stem)
    with torch.no_grad():
        for scale in fake.log_scales.values():
            scale += 5.0
    fake.keep_within()
    clamps = [
        node.name for node in static.graph.graph.nodes if "hardtanh" in str(node.target) and node.name in fake.zeros
    ]
    assert clamps
    assert all(step.scale == pytest.approx(6 / 255) for name, step in fake.steps().items() if name in clamps)
    assert any(step.scale > 1 for name, step in fake.steps().items() if name not in clamps)


def test_relations_hold_across_towers() -> None:
    """Embeddings of both towers turned together are no loss to relations; one tower turned alone is."""
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(8, 8))[0]
    loss = module._objectives(8, dataclasses.replace(FEW, feature=0.0))
    wanted = torch.cat((image, text))
    assert loss(torch.cat((image @ turn, text @ turn)), wanted).item() == pytest.approx(0.0, abs=1e-9)
    assert loss(torch.cat((image @ turn, text)), wanted).item() > 0.1


# --- refusals and the surface -----------------------------------------------------------------------------------------


def test_what_cannot_be_fine_tuned_is_refused_in_a_sentence() -> None:
    towers, calibration = toy.toy_towers(), toy.toy_calibration()
    with pytest.raises(UsageError, match=r"0 steps and nothing would change; give 1 or more"):
        Finetune(0)
    with pytest.raises(UsageError, match=r"batch 1, feature 1 and relation 16; nothing could be learnt"):
        Finetune(batch=1)
    with pytest.raises(UsageError, match=r"feature 0 and relation 0; nothing could be learnt"):
        Finetune(feature=0.0, relation=0.0)
    with pytest.raises(UsageError, match=r"fp32, fp16 learns nothing from it; add int8 or w4"):
        finetune_towers([("onnx", "fp32"), ("onnx", "fp16")], towers, calibration, FEW)
    with pytest.raises(UsageError, match=r"without calibration data; there is nothing to learn from"):
        finetune_towers([("onnx", "w4")], towers, None, FEW)
    few = Calibration(calibration.pixels[:40], calibration.ids[:40], "few")
    with pytest.raises(UsageError, match=r"image tower was given 30 inputs to learn from and needs 48"):
        finetune_towers([("onnx", "int8")], towers, few, FEW)
    # the further inputs count, those that calibrate too do not
    assert len(module._rows("image", few, prepared_tower(towers.image, few, "image"), calibration)) == 54


def test_a_graph_that_does_not_fit_is_refused() -> None:
    towers, calibration = toy.toy_towers(), toy.toy_calibration()
    graph, _ = prepared_tower(towers.image, calibration, "image").graph(static=True)
    with pytest.raises(IntegrityError, match="1 ranges that were set for this tower have no place in its ONNX graph"):
        tensor_overrides(graph, onnx.helper.make_graph([], "empty", [], []), {"hardtanh": Step(0.1, 0)})


def test_an_export_is_fine_tuned_and_says_so(tmp_path: Path) -> None:
    towers = toy.toy_towers()
    image_only = Towers(towers.image, None, dataclasses.replace(towers.contract, text=None, kind="image"))
    calibration = Calibration(toy.pictures(96, 100), np.zeros((0, 1), np.int32), "toy pictures")
    lines: list[str] = []
    folder = export_bundle(
        Exportable(image_only, None), tmp_path / "bundle", ("onnx:int8",), calibration_data=calibration, finetune=2,
        progress=lines.append,
    )  # fmt: skip
    notes = json.loads((folder / "bundle.json").read_text())["variants"][0]["notes"]["image"]["finetune"]
    assert notes["steps"] == 2
    assert notes["objectives"] == {"feature": 1.0, "gram": 16.0}
    assert notes["held_out_1_minus_cosine_after"] <= notes["held_out_1_minus_cosine_before"]
    assert any(line.startswith("fine-tuned int8 image: 1 - cosine") for line in lines)
    with pytest.raises(UsageError, match="0 steps"):
        export_bundle(
            Exportable(image_only, None), tmp_path / "none", ("onnx:int8",), calibration_data=calibration, finetune=0
        )
    assert not (tmp_path / "none").exists()


@pytest.mark.cuda
def test_a_gpu_trains_what_the_processor_then_writes(tmp_path: Path) -> None:
    towers, calibration = vit_towers(), toy.toy_calibration(96)
    finetune_towers([("onnx", "int8")], towers, calibration, dataclasses.replace(FEW, device="cuda"))
    left = trained(prepared_tower(towers.image, calibration, "image"))
    assert left is not None
    assert {value.device.type for value in left.graph.parameters()} == {"cpu"}
    variant = get_target("onnx").lower(towers, precision="int8", folder=tmp_path, calibration=calibration)
    assert "finetune" in variant.notes["image"]  # type: ignore[operator]
