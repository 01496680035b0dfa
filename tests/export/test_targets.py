"""Every backend writes what the contract says, computes what the model computes, and ships nothing of training."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from pocketvlm.edge.backends import open_backend
from pocketvlm.edge.errors import IntegrityError, MissingExtraError, UnknownNameError, UsageError
from pocketvlm.export import fidelity, prepare, token_tables
from pocketvlm.export.targets import get_target, list_targets
from pocketvlm.export.targets.base import Towers, Variant
from pocketvlm.export.targets.coreml import check_package
from pocketvlm.export.targets.onnx import run_file

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

# unmistakable in any file: no initialiser draws this number
MARK = 7.53125


class Trained(nn.Module):
    """A tower with what training leaves behind: a projector into the teacher's space and a masked-language head."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.teacher_projector = nn.Linear(toy.DIM, 77)
        nn.init.constant_(self.teacher_projector.weight, MARK)
        self.register_buffer("queue", torch.full((1013, toy.DIM), MARK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        embedding = self.tower(x)
        self.teacher_projector(embedding)  # its result feeds a loss, not the output
        return embedding


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def towers() -> Towers:
    plain = toy.toy_towers()
    return Towers(Trained(plain.image).eval(), Trained(plain.text).eval(), plain.contract)


@pytest.fixture(scope="module")
def lowered(towers: Towers, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Variant]]:
    """Every target at its default precisions, each lowered once; `test_precisions.py` has the rest."""
    folder = tmp_path_factory.mktemp("bundle")
    found = {}
    for name in list_targets():
        target = get_target(name)
        for precision in target.defaults:
            variant = target.lower(
                towers,
                precision=precision,
                folder=folder,
                calibration=toy.toy_calibration(),  # type: ignore[arg-type]
            )
            found[name, precision] = (folder, variant)
    return found


def expected(towers: Towers, tower: str, rows: np.ndarray) -> np.ndarray:
    module = towers.image if tower == "image" else towers.text
    assert module is not None
    with torch.no_grad():
        return copy.deepcopy(module).double()(torch.from_numpy(rows)).numpy()


INPUTS = {"image": lambda count: toy.pictures(count, 7), "text": lambda count: toy.sentences(count, 7)}


@pytest.mark.parametrize("name", ["onnx", "executorch"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_full_precision_equals_float64(lowered: Any, towers: Towers, name: str, tower: str) -> None:
    folder, variant = lowered[name, "fp32"]
    backend = open_backend(name, folder, variant)
    for count in (1, 5):
        rows = INPUTS[tower](count)
        found = backend.run_image(rows) if tower == "image" else backend.run_text(rows)
        reference = expected(towers, tower, rows)
        assert found.dtype == np.float32
        assert found.shape == (count, toy.DIM)
        np.testing.assert_allclose(found, reference, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-6)
    assert reference.std(axis=0).max() > 0.01  # the inputs do make a difference


@pytest.mark.parametrize("name", ["onnx", "executorch"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_int8_meets_the_floors_on_unseen_inputs(lowered: Any, towers: Towers, name: str, tower: str) -> None:
    folder, variant = lowered[name, "int8"]
    rows = INPUTS[tower](100)
    backend = open_backend(name, folder, variant)
    found = backend.run_image(rows) if tower == "image" else backend.run_text(rows)
    result = fidelity.fidelity(found, expected(towers, tower, rows))
    assert result.mean >= 0.99
    assert result.p1 >= 0.98
    assert result.mean < 1 - 1e-9, "an int8 file that equals float32 to the bit is not int8"
    assert variant.notes[tower]["meets_floor"] is True


def test_transformers_are_quantized_dynamically_and_convolutions_statically(lowered: Any) -> None:
    for name in ("onnx", "executorch"):
        notes = lowered[name, "int8"][1].notes
        assert "static" in notes["image"]["scheme"]
        assert "dynamic" in notes["text"]["scheme"]


def weights(model: Any) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_onnx_interface_and_privacy(lowered: Any, towers: Towers, precision: str, tower: str) -> None:
    folder, variant = lowered["onnx", precision]
    path = folder / variant.files[tower]
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    (entry,) = model.graph.input
    (output,) = model.graph.output
    assert entry.name == {"image": "pixels", "text": "ids"}[tower]
    assert output.name == "embedding"
    kinds = {"image": onnx.TensorProto.UINT8, "text": onnx.TensorProto.INT32}
    assert entry.type.tensor_type.elem_type == kinds[tower]
    first, *rest = entry.type.tensor_type.shape.dim
    assert first.dim_param, "the batch is free"
    assert [d.dim_value for d in rest] == ([toy.SIZE, toy.SIZE, 3] if tower == "image" else [toy.LENGTH])
    assert next(o.version for o in model.opset_import if o.domain == "") == variant.notes["opset"] == 18
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["pocketvlm.contract_sha256"] == towers.contract.digest()
    assert properties["pocketvlm.precision"] == precision
    # stack traces of the exporter hold this machine's folders
    data = path.read_bytes()
    assert b"toy_export" not in data
    assert str(Path(torch.__file__).parent).encode() not in data
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_train_only_modules_are_absent_from_onnx(lowered: Any, precision: str, tower: str) -> None:
    folder, variant = lowered["onnx", precision]
    found = weights(onnx.load(str(folder / variant.files[tower])))
    assert sum(value.size for value in found.values()) > 1000, "the weights are inside the file"
    for name, value in found.items():
        assert "projector" not in name
        assert "queue" not in name
        assert not {77, 1013} & set(value.shape), f"{name} has the shape of a train-only module"
        if value.dtype.kind == "f":
            assert not np.any(value == MARK), f"{name} holds a train-only module's values"


@pytest.mark.parametrize("key", [("executorch", "fp32"), ("coreml", "fp32")])
def test_train_only_modules_are_absent_from_the_other_files(lowered: Any, towers: Towers, key: Any) -> None:
    folder, variant = lowered[key]
    data = b""
    for relative in dict.fromkeys(variant.files.values()):
        path = folder / relative
        data += (
            path.read_bytes() if path.is_file() else b"".join(f.read_bytes() for f in path.rglob("*") if f.is_file())
        )
    row = towers.text.tower.token.weight[5].numpy().tobytes()  # type: ignore[union-attr]
    assert row in data, "the search below would find weights that are there"
    assert np.full(32, MARK, np.float32).tobytes() not in data
    assert b"projector" not in data


def test_token_table_is_int8_in_every_int8_file(lowered: Any, towers: Towers) -> None:
    table = towers.text.tower.token.weight.numpy()  # type: ignore[union-attr]
    folder, variant = lowered["onnx", "int8"]
    for name, value in weights(onnx.load(str(folder / variant.files["text"]))).items():
        assert value.size != table.size or value.dtype == np.int8, f"{name} is the token table in {value.dtype}"
    program = (folder / lowered["executorch", "int8"][1].files["text"]).read_bytes()
    assert table[5].tobytes() not in program
    rounded = np.round(table[5] / (np.abs(table[5]).max() / 127)).astype(np.int8)
    assert rounded.tobytes() in program


def test_int8_files_are_small(lowered: Any) -> None:
    """The toy is dominated by its table; real towers are held to 0.30 by the evidence script."""
    for name in ("onnx", "executorch"):
        sizes = {
            precision: sum((folder / f).stat().st_size for f in set(variant.files.values()))
            for (target, precision), (folder, variant) in lowered.items()
            if target == name
        }
        assert sizes["int8"] < 0.55 * sizes["fp32"]
    folder, variant = lowered["onnx", "int8"]
    full = (folder / lowered["onnx", "fp32"][1].files["text"]).stat().st_size
    assert (folder / variant.files["text"]).stat().st_size < 0.45 * full


def test_executorch_methods_and_constants(lowered: Any, towers: Towers) -> None:
    from executorch.runtime import Runtime, Verification

    folder, variant = lowered["executorch", "int8"]
    assert variant.batch == "fixed-1"
    assert variant.files["image"] == variant.files["text"]
    program = Runtime.get().load_program(folder / variant.files["image"], verification=Verification.Minimal)
    assert {"encode_image", "encode_text"} <= program.method_names
    constants = {"embed_dim": toy.DIM, "image_size": toy.SIZE, "context_length": toy.LENGTH}
    for name, value in (constants | {"contract_sha256": towers.contract.digest()}).items():
        assert program.load_method(name).execute([])[0] == value
    data = (folder / variant.files["image"]).read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in data


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_coreml_packages_are_read_back(lowered: Any, towers: Towers, precision: str) -> None:
    from coremltools.models.utils import load_spec

    folder, variant = lowered["coreml", precision]
    assert variant.batch == "fixed-1"
    assert variant.notes["minimum_deployment_target"] == "iOS17"
    spec = load_spec(str(folder / variant.files["image"]))
    image = spec.description.input[0]
    assert (image.name, image.type.WhichOneof("Type")) == ("pixels", "imageType")
    assert (image.type.imageType.width, image.type.imageType.height) == (toy.SIZE, toy.SIZE)
    text = load_spec(str(folder / variant.files["text"])).description.input[0]
    assert (text.name, list(text.type.multiArrayType.shape)) == ("ids", [1, toy.LENGTH])
    for tower in ("image", "text"):
        facts = check_package(folder / variant.files[tower], towers.contract, tower)
        assert facts["operations"]
    sizes = [
        sum(f.stat().st_size for f in (folder / lowered["coreml", p][1].files["text"]).rglob("weight.bin"))
        for p in ("fp16", "fp32")
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_package_that_does_not_fit_the_contract_is_refused(lowered: Any, towers: Towers) -> None:
    folder, variant = lowered["coreml", "fp16"]
    assert towers.contract.image is not None
    larger = replace(towers.contract, image=replace(towers.contract.image, size=toy.SIZE + 8))
    with pytest.raises(IntegrityError, match="image"):
        check_package(folder / variant.files["image"], larger, "image")
    with pytest.raises(IntegrityError, match="inputs"):
        check_package(folder / variant.files["image"], towers.contract, "text")


def test_coreml_identifiers_do_not_change_between_exports(lowered: Any, towers: Towers, tmp_path: Path) -> None:
    folder, variant = lowered["coreml", "fp16"]
    only_text = Towers(None, towers.text, towers.contract)
    get_target("coreml").lower(only_text, precision="fp16", folder=tmp_path, calibration=None)
    relative = f"{variant.files['text']}/Manifest.json"
    assert (folder / relative).read_bytes() == (tmp_path / relative).read_bytes()
    entries = json.loads((tmp_path / relative).read_text())
    assert entries["rootModelIdentifier"] in entries["itemInfoEntries"]


# --- preparation ----------------------------------------------------------------------------------------------------


def test_folding_batchnorm_changes_nothing_and_leaves_none() -> None:
    towers = toy.toy_towers()
    graph = prepare.capture(towers.image, toy.pictures(4))
    assert prepare.fold_batchnorm(graph) == 4
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    rows = toy.pictures(9, 3)
    np.testing.assert_allclose(fidelity.run_module(graph, rows), fidelity.run_module(towers.image, rows), atol=1e-6)
    assert not [name for name, _ in graph.named_buffers() if "running" in name]


FLOAT_LAYERS = 1


def eight_bits(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Onto the 256 values of an affine grid over [low, high] and zero, written out from the definition."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / 255, 1e-12)
    zero = round(-low / step)
    return (torch.round(x / step).clamp(-zero, 255 - zero)) * step


class RoundedLinears(torch.fx.Interpreter):
    """Linear layers with int8 weights per output channel and inputs of 8 bits by the row; the rest as it is."""

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op != "call_function" or "linear" not in str(n.target):
            return super().run_node(n)
        (x, weight, *rest), _ = self.fetch_args_kwargs_from_env(n)
        x = torch.stack([eight_bits(row, float(row.min()), float(row.max())) for row in x])
        step = weight.abs().amax(1, keepdim=True) / 127
        return n.target(x, (weight / step).round() * step, *rest)  # type: ignore[operator]


@torch.no_grad()
def with_rounded_linears(model: Any, rows: np.ndarray) -> Any:
    return RoundedLinears(model).run(torch.from_numpy(rows))


def test_bias_correction_restores_the_means_that_rounding_shifted() -> None:
    """Against an independent loop that rounds the weights one by one and the activations by their recorded ranges."""
    towers = toy.toy_towers()
    rows = toy.pictures(48, 5)
    graph = prepare.capture(towers.image, rows)
    prepare.fold_batchnorm(graph)
    plain = copy.deepcopy(graph)
    assert prepare.correct_bias(graph, rows, FLOAT_LAYERS) == 5 - FLOAT_LAYERS
    ranges: dict[str, tuple[float, float]] = {}

    def channel_means(model: Any, weights: bool, activations: bool) -> list[torch.Tensor]:
        means: list[torch.Tensor] = []

        class Loop(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> Any:
                kind = str(n.target).split(".")[1] if n.op == "call_function" else ""
                layer = kind in ("conv2d", "linear")
                if kind.startswith("hardtanh"):
                    x = super().run_node(n)
                    if not weights and not activations:
                        ranges[str(n)] = (float(x.min()), float(x.max()))
                    return eight_bits(x, *ranges[str(n)]) if activations else x
                if not layer and not kind.startswith("add"):
                    return super().run_node(n)
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                quantized = kind != "conv2d" or len(means) >= FLOAT_LAYERS
                inputs = []
                for source, x in zip(n.args[: 1 if layer else 2], args):
                    if not weights and not activations:
                        ranges[str(source)] = (float(x.min()), float(x.max()))
                    if kind == "linear" and activations:
                        x = torch.stack([eight_bits(row, float(row.min()), float(row.max())) for row in x])
                    elif quantized and activations:
                        x = eight_bits(x, *ranges[str(source)])
                    inputs.append(x)
                if not layer:
                    return n.target(*inputs, **kwargs)  # type: ignore[operator]
                weight = args[1].clone()
                for channel in range(len(weight) if quantized and weights else 0):
                    step = weight[channel].abs().max() / 127
                    weight[channel] = (weight[channel] / step).round() * step
                out = n.target(inputs[0], weight, *args[2:])  # type: ignore[operator]
                means.append(out.mean([0, 2, 3]) if out.ndim == 4 else out.mean(0))
                return out

        with torch.no_grad():
            Loop(model).run(torch.from_numpy(rows))
        return means

    truth = channel_means(plain, False, False)
    weights, both = channel_means(plain, True, False), channel_means(plain, True, True)
    corrected = channel_means(graph, True, True)
    for layer in range(FLOAT_LAYERS, 5):
        assert (weights[layer] - truth[layer]).abs().max() > 1e-5, "rounded weights shift the means in the first place"
        assert (both[layer] - weights[layer]).abs().max() > 1e-5, "and so do rounded activations"
        torch.testing.assert_close(corrected[layer], truth[layer], atol=2e-5, rtol=0)


class Loud(nn.Module):
    """Linear layers whose inputs have one loud channel: behind a LayerNorm that two of them share, behind one that a
    residual sum reads too, and behind a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(24), nn.LayerNorm(24)
        self.left, self.right = nn.Linear(24, 32), nn.Linear(24, 32)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.inner = nn.Linear(32, 24)
        for norm in (self.norm, self.second):
            norm.weight.data[5] = 60.0
            norm.bias.data[5] = 20.0
        self.up.weight.data[7] *= 30
        for layer in (self.left, self.right, self.up):
            layer.weight.data[:, 5] /= 60.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        y = self.second(self.inner(self.left(y).tanh() * self.right(y)))
        return y + self.down(nn.functional.gelu(self.up(y)))


def test_balancing_is_exact_in_float_and_tames_a_loud_channel() -> None:
    torch.manual_seed(3)
    module = Loud().eval().requires_grad_(False)
    rows = np.random.default_rng(0).normal(size=(64, 6, 24)).astype(np.float32)
    graph = prepare.capture(module, rows)
    before = copy.deepcopy(graph)
    assert prepare.balance_linears(graph, rows) >= 3
    unseen = np.random.default_rng(1).normal(size=(64, 6, 24)).astype(np.float32)
    expected = copy.deepcopy(module).double()(torch.from_numpy(unseen).double()).numpy()
    spread = np.abs(expected).max()
    np.testing.assert_allclose(fidelity.run_module(graph, unseen), expected, atol=2e-6 * spread)
    # the shared LayerNorm took the division in; the other, which a sum reads, and the GELU got a multiplication
    factors = [n for n in graph.graph.nodes if "mul" in str(n.target) and "balance_" in str(n.args[1])]
    assert sorted(str(n.args[0]) for n in factors) == ["gelu", "layer_norm_1"]
    names = {name.split("_layer_norm")[0] for name, _ in graph.named_parameters()}
    assert {"balanced_norm", "balanced_shift"} <= names

    def rounded(model: Any) -> float:
        found = with_rounded_linears(model, unseen).numpy()
        return float(((found - expected) ** 2).mean())

    assert rounded(graph) < 0.25 * rounded(before)
    chosen = graph.meta[prepare.BALANCE]
    assert len(chosen) == 3
    assert set(chosen.values()) <= {"0.25", "0.5", "0.75", "rms"}


@pytest.mark.parametrize("seed", range(4))
def test_balancing_is_never_worse_than_none_on_unseen_inputs(seed: int) -> None:
    """Each layer against itself without it, loud channels or not: the search has to gain on rows that it did not set
    its scales by, or nothing is done."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    spread = (10.0 ** rng.uniform(-1.5, 1.5, 24)).astype(np.float32) if seed % 2 else np.ones(24, np.float32)
    layer = nn.Linear(24, 32).eval().requires_grad_(False)
    layer.weight /= torch.from_numpy(spread) ** (seed / 4)
    rows, unseen = (rng.normal(size=(256, 24)).astype(np.float32) * spread for _ in range(2))
    graph = prepare.capture(layer, rows)
    before = copy.deepcopy(graph)
    prepare.balance_linears(graph, rows)

    def error(model: Any) -> float:
        found = with_rounded_linears(model, unseen)
        return float(((found - layer(torch.from_numpy(unseen))) ** 2).mean())

    assert error(graph) <= error(before)


def test_balancing_leaves_even_channels_alone() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 16)).eval().requires_grad_(False)
    rows = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    graph = prepare.capture(module, rows)
    names = [name for name, _ in graph.named_parameters()]
    assert prepare.balance_linears(graph, rows) == 0
    assert [name for name, _ in graph.named_parameters()] == names
    silent = prepare.capture(module, np.zeros_like(rows))
    assert prepare.balance_linears(silent, np.zeros_like(rows)) == 0, "nothing to go by"


def test_targets_share_what_they_prepare_and_never_a_stale_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketvlm.export.targets.onnx import prepared_tower

    towers, calibration = toy.toy_towers(), toy.toy_calibration(16)
    assert towers.image is not None
    first = prepared_tower(towers.image, calibration, "image")
    assert prepared_tower(towers.image, calibration, "image") is first
    graph, float_layers = first.graph(static=True)
    assert float_layers == prepare.STEM_LAYERS
    graph.graph.erase_node(next(n for n in graph.graph.nodes if n.op == "output"))
    assert any(n.op == "output" for n in first.graph(static=True)[0].graph.nodes), "each backend gets a copy"
    fewer = replace(calibration, pixels=calibration.pixels[:8])
    assert prepared_tower(towers.image, fewer, "image") is not first
    with torch.no_grad():
        towers.image.projection.weight[0, 0] += 1  # type: ignore[union-attr,operator,index]
    assert prepared_tower(towers.image, calibration, "image") is not first, "the weights have changed"


def test_int8_table_is_within_half_a_step_of_the_float_table() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(300, 16), nn.Embedding(77, 4))
    module[0].weight.data[3] = 0
    quantized = token_tables.quantize_tables(module)
    assert isinstance(quantized[0], token_tables.Int8Embedding)  # type: ignore[index]
    assert isinstance(quantized[1], nn.Embedding), "a table of positions stays float"  # type: ignore[index]
    assert isinstance(module[0], nn.Embedding), "the original is untouched"
    ids = torch.arange(300, dtype=torch.int32).reshape(20, 15)
    found, table = quantized[0](ids), module[0].weight[ids.long()]  # type: ignore[index]
    step = table.abs().amax(-1, keepdim=True) / 127
    assert bool(((found - table).abs() <= step / 2 + 1e-7).all())
    assert quantized[0].table.dtype == torch.int8  # type: ignore[index]


def test_fidelity_counts_broken_rows_as_opposite() -> None:
    good = np.eye(4)
    broken = good.copy()
    broken[0] = np.nan
    assert fidelity.fidelity(good, good).mean == 1.0
    assert fidelity.fidelity(broken, good).minimum == -1.0
    assert not fidelity.fidelity(broken, good).comfortable


def test_a_scheme_below_the_floor_gives_way_to_a_better_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pocketvlm.export.targets import onnx as target

    def ruin(source: Path, out: Path, *rest: Any) -> Path:
        model = onnx.load(str(source))
        scale = next(i for i in model.graph.initializer if numpy_helper.to_array(i).ndim == 4)
        noise = np.random.default_rng(0).normal(size=numpy_helper.to_array(scale).shape).astype(np.float32)
        scale.CopyFrom(numpy_helper.from_array(noise, scale.name))
        onnx.save(model, str(out))
        return out

    monkeypatch.setattr(target, "_quantize_static", ruin)
    towers = toy.toy_towers()
    variant = get_target("onnx").lower(
        Towers(towers.image, None, towers.contract),
        precision="int8",
        folder=tmp_path,
        calibration=toy.toy_calibration(),
    )
    notes: Any = variant.notes["image"]
    assert notes["scheme"] == "dynamic"
    assert notes["tried"] == ["static-qdq", "dynamic"]
    initializers = onnx.load(str(tmp_path / variant.files["image"])).graph.initializer
    float_weights = [e for e in initializers if len(e.dims) == 4 and e.data_type == onnx.TensorProto.FLOAT]
    integers = [e for e in initializers if len(e.dims) == 4 and e.data_type == onnx.TensorProto.INT8]
    assert len(integers) == 1, "all convolutions compute in float, and all but the first three are stored as integers"
    assert max(np.prod(e.dims) for e in float_weights) < np.prod(integers[0].dims)
    assert notes["meets_floor"]
    found = run_file(tmp_path / variant.files["image"], toy.pictures(8), "image")
    assert fidelity.fidelity(found, fidelity.run_module(towers.image, toy.pictures(8))).p1 > 0.98


def test_no_rounding_between_a_convolution_and_its_clamp() -> None:
    """XNNPACK fuses the clamp; a pair before it would spend the 8 bits on values that ReLU6 cuts away."""
    from pocketvlm.export.targets.executorch import _convert
    from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer

    towers = toy.toy_towers()
    for float_layers in (0, 2, 3, 4):
        source = prepare.capture(towers.image, toy.pictures(16))
        prepare.fold_batchnorm(source)
        graph: Any = _convert(source, TowerQuantizer(float_layers), toy.pictures(16))
        convolutions = [n for n in graph.graph.nodes if n.op == "call_function" and "conv2d" in str(n.target)]
        assert len(convolutions) == 4
        clamped = [next(iter(c.users)) for c in convolutions if "hardtanh" in str(next(iter(c.users)).target)]
        assert len(clamped) == 3
        rounded = ["dequantize_per_channel" in str(c.args[1].target) for c in convolutions]
        assert rounded == [index >= float_layers for index in range(4)]
        (linear,) = [n for n in graph.graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
        assert "dequantize_per_channel" in str(linear.args[1].target)
        assert linear.args[0].target is torch.ops.quantized_decomposed.dequantize_per_tensor.tensor, "its own range"


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(towers: Towers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'onnx'"):
        get_target("onx")
    with pytest.raises(UsageError, match=r"cannot write precision .palette4. .*only fp32, fp16"):
        get_target("onnx").lower(towers, precision="palette4", folder=tmp_path, calibration=None)
    for name in ("onnx", "executorch"):
        with pytest.raises(UsageError, match="without calibration data"):
            get_target(name).lower(towers, precision="int8", folder=tmp_path, calibration=None)
    few = replace(toy.toy_calibration(), pixels=toy.pictures(3))
    with pytest.raises(UsageError, match="image tower was given 3 inputs"):
        get_target("onnx").lower(towers, precision="int8", folder=tmp_path, calibration=few)
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in ("onnxscript", "executorch", "coremltools"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr("pocketvlm.edge.errors.importlib.import_module", without)
    from pocketvlm.export.targets.coreml import CoreMLTarget
    from pocketvlm.export.targets.executorch import ExecuTorchTarget
    from pocketvlm.export.targets.onnx import OnnxTarget

    for target, extra in ((OnnxTarget, "onnx"), (ExecuTorchTarget, "executorch"), (CoreMLTarget, "coreml")):
        with pytest.raises(MissingExtraError, match=rf"pocketvlm\[{extra}\]"):
            target()


def test_an_output_named_like_an_inner_value_is_renamed(lowered: Any) -> None:
    """The exporter calls the token lookup "embedding" as well; such a file would not be a valid graph."""
    folder, variant = lowered["onnx", "fp32"]
    model = onnx.load(str(folder / variant.files["text"]))
    names = [name for node in model.graph.node for name in node.output]
    assert names.count("embedding") == 1
    assert len(names) == len(set(names))
