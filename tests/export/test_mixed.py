"""A plan keeps exactly its blocks in float, in every target's saved files; without any it is int8."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from pocketvlm.edge.backends import open_backend
from pocketvlm.edge.errors import PocketvlmError, UnknownNameError, UsageError
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.graphs import block_of, in_float, path_of
from pocketvlm.export.mil.program import load_package
from pocketvlm.export.mixed import Plan, known_blocks, load_plan
from pocketvlm.export.parity_coreml import _constants
from pocketvlm.export.prepare import CONVOLUTIONS, LINEARS, Prepared, residual_sums
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.base import Towers, Variant
from pocketvlm.export.targets.executorch import ExecuTorchTarget

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

KEEP = {"image": ("blocks.1", "projection"), "text": ("qkv", "token")}
EMPTY: dict[str, tuple[str, ...]] = {"image": (), "text": ()}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU6()
        )
        self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.point(self.depth(x))


class Blocks(nn.Module):
    """Three convolutions that stay in float, three blocks with residual sums, a projection."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU6(), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        )
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.projection = nn.Linear(width, toy.DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels.permute(0, 3, 1, 2).to(self.projection.weight.dtype) - 127.5) / 127.5
        return F.normalize(self.projection(self.blocks(self.stem(x)).mean((2, 3))), dim=-1)


class Wrapped(nn.Module):
    """As `students.deploy` wraps a tower; no part of a block's name."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x)


@pytest.fixture(scope="module")
def towers() -> Towers:
    plain = toy.toy_towers()
    torch.manual_seed(1)
    image = Blocks()
    with torch.no_grad():
        for seed in range(4):
            image.train()(torch.from_numpy(toy.pictures(32, seed)))
    return Towers(Wrapped(image.eval()).eval().requires_grad_(False), Wrapped(plain.text).eval(), plain.contract)


Lowered = dict[tuple[str, str], tuple[Path, Variant]]


@pytest.fixture(scope="module")
def lowered(towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    calibration = toy.toy_calibration()
    found = {}
    folder = tmp_path_factory.mktemp("lowered")
    for name in ("onnx", "executorch", "coreml"):
        plain: Any = "w8" if name == "coreml" else "int8"
        for what, precision, plan in (
            ("kept", "mixed", Plan(KEEP)), ("empty", "mixed", Plan(EMPTY)), ("int8", plain, None),
        ):  # fmt: skip
            if name == "executorch" and what != "kept":
                continue  # lowering takes long: `programs` stops before it
            given = towers if what == "kept" else replace(towers, text=None)
            how: Any = {"precision": precision, "folder": folder / what, "calibration": calibration}
            found[name, what] = (folder / what, get_target(name).lower(given, plan=plan, **how))
    return found


def programs(towers: Towers, folder: Path, precision: Any, plan: Plan | None) -> dict[str, Any]:
    """What ExecuTorch is given to lower."""
    written: dict[str, Any] = {}
    target = ExecuTorchTarget(lambda made, *rest: written.update(made))
    target.lower(
        replace(towers, text=None), precision=precision, folder=folder, calibration=toy.toy_calibration(), plan=plan
    )
    return written


def ready(towers: Towers, tower: str, keep: dict[str, tuple[str, ...]]) -> Prepared:
    calibration = toy.toy_calibration()
    module, rows = (towers.image, calibration.pixels) if tower == "image" else (towers.text, calibration.ids)
    assert module is not None
    return Prepared(module, rows).keeping(keep[tower])


def layers(towers: Towers, tower: str, keep: dict[str, tuple[str, ...]]) -> dict[str, tuple[bool, np.ndarray]]:
    """Path -> whether the layer shall be in float, and its weight as prepared. The stem is left out."""
    graph, float_layers = ready(towers, tower, keep).graph(static=tower == "image")
    found, convolutions = {}, 0
    for node in graph.graph.nodes:
        if node.target not in (*CONVOLUTIONS, *LINEARS):
            continue
        convolutions += node.target in CONVOLUTIONS
        if node.target in LINEARS or convolutions > float_layers:
            found[path_of(node)] = (in_float(node), graph.get_parameter(str(node.args[1].target)).detach().numpy())
    return found


def test_blocks_are_marked_by_their_path_and_survive_preparation(towers: Towers) -> None:
    marked = {path: kept for path, (kept, _) in layers(towers, "image", KEEP).items()}
    assert marked == {
        "blocks.0.depth.0": False, "blocks.0.point.0": False, "blocks.1.depth.0": True, "blocks.1.point.0": True,
        "blocks.2.depth.0": False, "blocks.2.point.0": False, "projection": True,
    }  # fmt: skip
    graph, _ = ready(towers, "image", KEEP).graph(static=True)
    assert [path_of(node) for node in residual_sums(graph)] == ["blocks.0", "blocks.2"]
    assert {path: kept for path, (kept, _) in layers(towers, "text", KEEP).items()} == {
        "qkv": True, "out": False, "projection": False,
    }  # fmt: skip


def test_the_block_of_a_layer_is_its_path_through_the_last_number() -> None:
    assert block_of("trunk.blocks.3.1.conv_pw") == "trunk.blocks.3.1"
    assert block_of("blocks.0.qkv") == "blocks.0"
    assert block_of("projection.first") == "projection.first"


def same(stored: np.ndarray, weight: np.ndarray) -> bool:
    turned = [weight, weight.T] if weight.ndim == 2 else [weight, np.moveaxis(weight, 1, -1)]
    return any(stored.size == w.size and np.allclose(stored.ravel(), w.ravel(), rtol=2e-3, atol=1e-5) for w in turned)


@pytest.mark.parametrize(("tower", "what"), [("image", "kept"), ("text", "kept"), ("image", "empty")])
def test_onnx_files_hold_float_weights_of_kept_blocks_and_integers_of_all_others(
    lowered: Lowered, towers: Towers, tower: str, what: str
) -> None:
    folder, variant = lowered["onnx", what]
    model = onnx.load(str(folder / variant.files[tower]))
    stored = [numpy_helper.to_array(entry) for entry in model.graph.initializer]
    for path, (kept, weight) in layers(towers, tower, KEEP if what == "kept" else EMPTY).items():
        assert any(s.dtype == np.float32 and same(s, weight) for s in stored) == kept, path
        assert kept or any(s.dtype == np.int8 and s.size == weight.size for s in stored), path
    assert any(s.dtype == np.float32 and s.shape == (toy.VOCAB, 32) for s in stored) == (
        tower == "text" and what == "kept"
    )
    # and what is computed with them is float too
    made = {name: node for node in model.graph.node for name in node.output}
    sums = [n for n in model.graph.node if n.op_type == "Add" and all(i in made for i in n.input)]
    if tower == "image":
        rounded = [all(made[name].op_type == "DequantizeLinear" for name in node.input) for node in sums]
        assert rounded == ([True, False, True] if what == "kept" else [True] * 3)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_core_ml_packages_too(lowered: Lowered, towers: Towers, tower: str) -> None:
    folder, variant = lowered["coreml", "kept"]
    _, program = load_package(folder / variant.files[tower])
    function = next(iter(program.functions.values()))
    packed = {op.name for op in function.operations if op.op_type.startswith("constexpr")}
    stored = _constants(function)
    checked = 0
    for path, (kept, weight) in layers(towers, tower, KEEP).items():
        if weight.size < 2048:
            continue
        checked += 1
        if kept and path == "qkv":  # int8 divides its channels, Core ML does not round inputs
            weight = towers.text.get_submodule(f"tower.{path}").weight.numpy()  # type: ignore[union-attr, operator]
        found = [name for name, value in stored.items() if same(value, weight)]
        assert bool(found) == kept, path
        assert packed.isdisjoint(found)
    assert checked
    tables = [name for name, value in stored.items() if value.shape == (toy.VOCAB, 32)]
    assert not packed & set(tables)
    assert bool(packed) == (tower == "image"), "the other weights are packed"


def test_executorch_programs_too(towers: Towers, lowered: Lowered) -> None:
    folder, variant = lowered["executorch", "kept"]
    content = (folder / variant.files["image"]).read_bytes()
    for tower in ("image", "text"):
        for path, (kept, weight) in layers(towers, tower, KEEP).items():
            turned = [weight, np.moveaxis(weight, 1, -1), np.moveaxis(weight, 0, -1)]
            assert any(np.ascontiguousarray(w).tobytes() in content for w in turned) == kept, path


@pytest.mark.parametrize("name", ["onnx", "executorch"])
def test_kept_blocks_bring_the_files_nearer_to_the_model(lowered: Lowered, towers: Towers, name: str) -> None:
    def distance(what: str, tower: str, rows: np.ndarray) -> float:
        backend = open_backend(name, *lowered[name, what])
        found = backend.run_image(rows) if tower == "image" else backend.run_text(rows)
        module = towers.image if tower == "image" else towers.text
        assert module is not None
        return 1 - fidelity(found, run_module(module, rows)).mean

    assert 0 < distance("kept", "text", toy.sentences(60, 7)) < 0.001
    rows = toy.pictures(60, 7)
    assert 0 < distance("kept", "image", rows) < (distance("empty", "image", rows) if name == "onnx" else 0.001)


def test_an_empty_plan_gives_executorch_the_programs_of_int8(towers: Towers, tmp_path: Path) -> None:
    one, other = (programs(towers, tmp_path, *how) for how in (("mixed", Plan(EMPTY)), ("int8", None)))
    assert list(one) == list(other)
    for method in one:
        a, b = one[method], other[method]
        assert [str(n.target) for n in a.graph.nodes] == [str(n.target) for n in b.graph.nodes]
        assert list(a.state_dict) == list(b.state_dict)
        assert all(torch.equal(a.state_dict[key], b.state_dict[key]) for key in a.state_dict)
        assert torch.equal(*(program.module()(torch.from_numpy(toy.pictures(1, 7))) for program in (a, b)))


@pytest.mark.parametrize("name", ["onnx", "coreml"])
def test_an_empty_plan_is_int8_value_for_value(lowered: Lowered, name: str) -> None:
    (folder, mixed), (beside, plain) = lowered[name, "empty"], lowered[name, "int8"]
    one, other = folder / mixed.files["image"], beside / plain.files["image"]
    if name == "coreml":
        weights = "Data/com.apple.CoreML/weights/weight.bin"
        assert (one / weights).read_bytes() == (other / weights).read_bytes()
        return
    models = [onnx.load(str(path)) for path in (one, other)]
    for model in models:
        del model.metadata_props[:]
    assert models[0] == models[1], "all but the name of the precision"


# --- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan(KEEP, "toy", "abc", "r@5 -0.5", {"image": {"blocks.1": {"damage": 0.1}}}, "64 pictures")
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    (tmp_path / "short.json").write_text('{"keep": {"text": ["qkv"]}}')
    assert load_plan(tmp_path / "short.json").blocks("text") == ("qkv",)
    assert load_plan(tmp_path / "short.json").blocks("image") == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "has no 'keep'"),
        ('{"keep": {"image": "blocks.1"}}', "a list of block names is expected"),
        ('{"keep": {"vision": []}}', "unknown tower in the plan 'vision'"),
        ('{"keep": {}, "kept": []}', "unknown key in the plan 'kept'; did you mean 'keep'"),
        ('{"schema": "2.0", "keep": {}}', "another schema than 1.0"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PocketvlmError, match=says):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="cannot be read"):
        load_plan(tmp_path / "absent.json")


def test_a_plan_that_does_not_fit_is_refused(towers: Towers, tmp_path: Path) -> None:
    def check(plan: Plan, only: tuple[str, ...] = ("image", "text")) -> None:
        both = {"image": towers.image, "text": towers.text}
        plan.check(towers.contract, {tower: both[tower] for tower in only})

    check(Plan(KEEP, contract_sha256=towers.contract.digest()))
    with pytest.raises(
        UnknownNameError, match=r"block of the image tower in the plan 'block\.1'; did you mean 'blocks\.1'"
    ):
        check(Plan({"image": ("block.1",)}))
    with pytest.raises(UsageError, match=r"made for 'other' .* was given, .* set contract_sha256 to null"):
        check(Plan(KEEP, "other", replace(towers.contract, model_id="other").digest()))
    with pytest.raises(UsageError, match="no such tower"):
        check(Plan(KEEP), ("image",))
    assert "blocks.1.depth.0" in known_blocks(towers.image)  # type: ignore[arg-type]
    assert "stem" in known_blocks(towers.image)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["onnx", "executorch", "coreml"])
def test_mixed_without_a_plan_is_refused(towers: Towers, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="mixed without a plan"):
        get_target(name).lower(towers, precision="mixed", folder=tmp_path, calibration=toy.toy_calibration())
    with pytest.raises(UsageError, match="mixed without a plan"):
        export_bundle("absent", tmp_path / "out", (name,), ("mixed",))
    with pytest.raises(UsageError, match="no chosen precision is mixed"):
        export_bundle("absent", tmp_path / "out", (name,), plan=Plan(KEEP))


def test_a_bundle_keeps_the_plan(towers: Towers, tmp_path: Path) -> None:
    from pocketvlm.edge.bundle import Bundle
    from pocketvlm.export.source import Exportable

    only = Towers(towers.image, None, replace(towers.contract, text=None, kind="image-labels", labels=("a", "b")))
    model = Exportable(only, None, (), {})
    plan = Plan({"image": KEEP["image"]}, budget="cosine 0.99")
    plan.save(tmp_path / "mine.json")
    out = export_bundle(
        model, tmp_path / "b", ("onnx",), ("fp32", "mixed"), toy.toy_calibration(), plan=tmp_path / "mine.json"
    )
    bundle = Bundle.load(out)
    variant = bundle.variant("onnx", "mixed")
    assert variant.notes["in_float"] == {"image": ["blocks.1", "projection"]}
    assert load_plan(out / str(variant.notes["plan"])) == plan
    assert "mixed.json" in bundle.raw["files"]
    assert json.loads((out / "mixed.json").read_text())["budget"] == "cosine 0.99"
