"""Fine-tuning with fake quantization: the integers that were trained are the integers that ship."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pocketvlm.edge.backends import open_backend
from pocketvlm.export.fake_quant import FakeQuantized
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.finetune import Finetune, finetune_towers
from pocketvlm.export.prepare import CONVOLUTIONS, STEM_LAYERS
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.base import Calibration, Towers, Variant
from pocketvlm.export.targets.onnx import prepared_tower
from pocketvlm.export.tuned import INT8, Trained, trained

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

FEW = Finetune(steps=16, batch=16, rate=2e-4, seed=3)


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
    towers: Towers = toy.toy_towers()
    return Towers(ImageViT().eval().requires_grad_(False), towers.text, towers.contract)


Made = tuple[Towers, Calibration, Path, dict[tuple[str, str], Variant]]
WANTED = (("onnx", "int8"), ("executorch", "int8"), ("onnx", "w4"))


@pytest.fixture(scope="module", params=["convolutions", "vit"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Both kinds of student, tuned and lowered once."""
    towers = toy.toy_towers() if request.param == "convolutions" else vit_towers()
    calibration = toy.toy_calibration(96)
    wanted = WANTED if request.param == "convolutions" else WANTED[:2]
    finetune_towers(wanted, towers, calibration, FEW)
    folder = tmp_path_factory.mktemp(request.param)
    how: Any = {"folder": folder, "calibration": calibration}
    return towers, calibration, folder, {(t, p): get_target(t).lower(towers, precision=p, **how) for t, p in wanted}  # type: ignore[arg-type]


def result(found: Made, tower: str) -> Trained:
    towers, calibration, _, _ = found
    owner = towers.image if tower == "image" else towers.text
    assert owner is not None
    ready = prepared_tower(owner, calibration, tower)  # type: ignore[arg-type]
    left = trained(ready)
    assert left is not None
    return left


def fake_of(found: Made, tower: str) -> FakeQuantized:
    """The trained graph once more with its own grids."""
    left = result(found, tower)
    convolutions = [node for node in left.graph.graph.nodes if node.target in CONVOLUTIONS]
    rows = (found[1].pixels if tower == "image" else found[1].ids)[:2]
    fake = FakeQuantized(copy.deepcopy(left.graph), rows, STEM_LAYERS if left.steps else len(convolutions), INT8)
    with torch.no_grad():
        for name, step in left.steps.items():
            fake.log_scales[name].copy_(torch.tensor(step.scale, dtype=torch.float64).log())
            fake.zeros[name] = step.zero
    return fake


def integers(fake: FakeQuantized) -> dict[str, tuple[Any, Any]]:
    """Layer -> (round(w / scale), scale per output channel) of every weight that the files round."""
    found = {}
    for node in fake.graph_module.graph.nodes:
        if fake.rounds_weight(node):
            weight = fake.graph_module.get_parameter(str(node.args[1].target)).detach()
            scale = weight.flatten(1).abs().amax(1) / 127
            levels = torch.round(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).to(torch.int8)
            found[node.name] = (levels.numpy(), scale.numpy())
    return found


def rows_of(tower: str, count: int = 48) -> Any:
    return toy.pictures(count, 7) if tower == "image" else toy.sentences(count, 7)


# --- the integers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_holds_the_trained_integers(made: Made, tower: str) -> None:
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
    steps = result(made, tower).steps
    assert sorted(pairs.values()) == sorted(
        {(float(np.float32(s.scale)), s.zero) for s in steps.values()} & {*pairs.values()}
    )
    # values that nothing in int8 reads lose their pair; all others have it
    assert len(pairs) >= len(steps) - 1


@pytest.mark.parametrize("tower", ["image", "text"])
def test_executorch_computes_with_the_trained_integers(made: Made, tower: str) -> None:
    from pocketvlm.export.targets.executorch import _quantize

    towers, calibration, _, _ = made
    owner = towers.image if tower == "image" else towers.text
    assert owner is not None
    graph, _ = _quantize(prepared_tower(owner, calibration, tower))  # type: ignore[arg-type]
    fake = fake_of(made, tower)
    constants = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    stored = [v for v in constants.values() if v.dtype == torch.int8 and v.ndim > 1 and len(v) != 2000]
    for name, (levels, _) in integers(fake).items():
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


@pytest.mark.parametrize("name", ["onnx", "executorch"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_runtime_computes_what_was_trained(made: Made, name: str, tower: str) -> None:
    """One step of the last rounding is 1/255 of a row's range in every input of the projection; twice its effect on
    the embedding is allowed, and a grid that is off by one step anywhere is caught by the tests above."""
    rows = rows_of(tower)
    backend = open_backend(name, made[2], made[3][name, "int8"])
    run = backend.run_image if tower == "image" else backend.run_text
    found = np.concatenate([run(rows[i : i + 1]) for i in range(len(rows))])
    expected = run_module(fake_of(made, tower).eval(), rows)
    distance = 1 - fidelity(found, expected).minimum
    plain = 1 - fidelity(found, run_module(result(made, tower).graph, rows)).mean
    print(f"{name} {tower}: worst 1 - cosine {distance:.2e} (to the graph without rounding {plain:.2e})")
    assert distance < 2e-4
