"""Somebody else's model as a reference: upstream's own forward is what is recorded, and its bundle is held to that."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.export import foreign, numerics
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.numerics import EmulatedTF32, NarrowOperators, spread, strict_numerics
from pocketvlm.export.parity import check_parity
from pocketvlm.export.parity_report import print_report, render_html
from pocketvlm.export.reference import load_reference, record_reference, show
from pocketvlm.export.reference_write import encode_rows
from pocketvlm.export.subject import ForeignSubject, StudentSubject, open_subject
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.hf import joint


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"subject_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


toy, upstreams = _load("toy_parity"), _load("test_foreign")
FULL = torch.full
KINDS = ("open_clip", "open_clip_custom", "hf_clip", "hf_siglip")


class Recorded:
    """spec, upstream's float32 forward on strings and planes, a bundle and a reference of one tiny upstream model."""

    def __init__(self, folder: Path, kind: str) -> None:
        model = folder / "model"
        model.mkdir()
        save = upstreams.save_open_clip if kind.startswith("open_clip") else upstreams.save_hf
        self.upstream = save(model, kind)
        self.spec = self.upstream.spec
        self.bundle = export_bundle(self.spec, folder / "bundle", ("onnx:fp32",))
        self.reference = folder / "reference"
        record_reference(self.spec, self.reference, data=toy.toy_data(), device="cpu")


@pytest.fixture(scope="module", params=KINDS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    torch.set_num_threads(1)
    return Recorded(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("clip"), "hf_clip")


def test_an_exported_upstream_model_passes_and_says_what_was_not_compared(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    report = check_parity(recorded.bundle, recorded.reference)
    assert (report.status, report.exit_code) == ("pass", 0), report.message
    (variant,) = report.variants
    found = [(stage.stage, stage.status) for stage in variant.stages]
    assert found == [("S0", "not-compared"), ("S1", "pass"), ("S2", "pass"), ("S4", "pass"), ("S5", "pass")]
    for tower in ("image", "text"):
        assert variant.stage("S2").details[tower]["one_minus_cosine_max"] <= 1e-6
    assert "not compared: S0 (bytes to pixels)" in report.message
    assert "not compared: S0" in variant.message
    page = render_html(report)
    assert "upstream&#39;s own preprocessing was not run" in page
    assert 'class="c light not-compared"' in page
    print_report(report)
    out = " ".join(capsys.readouterr().out.split())
    assert "own preprocessing was not run" in out
    assert "budgets.json" in out


def _oracle(recorded: Recorded, run: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Upstream's module in float64, called by hand."""
    teacher: Any = load_teacher(recorded.spec)
    model = teacher.model.double()
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    monkeypatch.setattr(torch, "full", lambda *a, **k: FULL(*a, **{"dtype": torch.float64, **k}))
    mean, std = (
        torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (teacher.image.mean, teacher.image.std)
    )
    planes = (torch.from_numpy(run.arrays["pixels"]).permute(0, 3, 1, 2).double() / 255 - mean) / std
    strings = [record.text for record in run.texts if record.row is not None]
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            batch = teacher._batch(strings)
            found = model.get_image_features(pixel_values=planes), model.get_text_features(**batch)
            return joint(found[0]).numpy(), joint(found[1]).numpy()
        return model.encode_image(planes).numpy(), model.encode_text(teacher.tokenize(strings)).numpy()


def test_the_recording_is_upstreams_own_forward_in_float64(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_reference(recorded.reference)
    image, text = _oracle(recorded, run, monkeypatch)
    assert image.dtype == np.float64
    np.testing.assert_allclose(run.arrays["image_raw"], image, rtol=0, atol=1e-12 * np.abs(image).max())
    np.testing.assert_allclose(run.arrays["text_raw"], text, rtol=0, atol=1e-12 * np.abs(text).max())
    assert run.manifest["numerics"]["dtype"] == "float64"
    assert run.manifest["numerics"]["narrower_operators"] == []
    assert run.manifest["source"]["kind"] == "upstream"
    noise = {key: entry["image"]["one_minus_cosine_max"] for key, entry in run.noise.items() if "image" in entry}
    assert noise["rerun"] == 0
    assert 0 < noise["float32"] < 1e-10 < noise["tf32"] < 1e-2


def test_the_recording_has_taps_of_both_towers_weights_and_no_path(recorded: Recorded) -> None:
    run = load_reference(recorded.reference)
    for tower, (names, values) in run.taps.items():
        assert len(names) > 3, tower
        assert all(("vis" in name) == (tower == "image") for name in names), names
        assert math.isfinite(values.max())
    for tower in ("image_tower.", "text_tower."):
        assert any(name.startswith(tower) and len(fact["shape"]) > 1 for name, fact in run.weights.items())
    assert str(recorded.reference.parent) not in (recorded.reference / "manifest.json").read_text()
    assert any("teacher weights" in row[0] for row in run.manifest["licences"])
    show(run)


def test_a_corrupted_graph_of_an_upstream_model_fails(recorded: Recorded, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(recorded.bundle, tmp_path / "bundle"))
    path = next(folder.rglob("*text*.onnx"))
    model = onnx.load(str(path))
    weight = max(model.graph.initializer, key=lambda w: math.prod(w.dims) if w.data_type == 1 else 0)
    value = numpy_helper.to_array(weight).copy()
    value *= 1 + 0.01 * np.sin(np.arange(value.size, dtype=np.float32)).reshape(value.shape)
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    onnx.save(model, str(path))
    toy.sign(folder)
    report = check_parity(folder, recorded.reference)
    assert (report.status, report.exit_code) == ("fail", 1)
    assert report.variants[0].failed_stage == "S2"
    assert "text" in report.message


def test_a_tower_cut_out_wrongly_is_seen_by_the_reference(
    clip: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "_SAME", math.inf)
    monkeypatch.setattr(foreign._HfText, "_embed", lambda self, ids: self.projection(self.text_model(ids)[0][:, 0]))
    bundle = export_bundle(clip.spec, tmp_path / "bundle", ("onnx:fp32",))
    report = check_parity(bundle, clip.reference)
    assert report.variants[0].failed_stage == "S2"


def test_other_pixels_fail_although_equal_ones_prove_nothing(clip: Recorded, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip.bundle, tmp_path / "bundle"))
    contract = json.loads((folder / "bundle.json").read_text())["contract"]
    contract["image"]["background"] = [0, 0, 0]
    toy.sign(folder, contract=contract)
    assert check_parity(folder, clip.reference).variants[0].failed_stage == "S0"


def test_core_ml_weights_of_an_upstream_model_are_recognised(clip: Recorded, tmp_path: Path) -> None:
    bundle = export_bundle(clip.spec, tmp_path / "bundle", ("coreml:fp32",))
    (variant,) = check_parity(bundle, clip.reference).variants
    assert variant.stage("S2").status == "pass", variant.message
    assert variant.stage("S2").details["structure"]["text"]["weights_found"] >= 3


def test_a_loaded_teacher_is_recorded_and_left_as_it_was(clip: Recorded, tmp_path: Path) -> None:
    teacher: Any = load_teacher(clip.spec)
    again = record_reference(teacher, tmp_path / "run", data=toy.toy_data(), device="cpu")
    first = load_reference(clip.reference).manifest["files"]
    assert again.manifest["files"] == first
    assert next(teacher.model.parameters()).dtype == torch.float32


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="ViT-B-32"):
        open_subject("open_clip:ViT-B-23@nothing.pt")

    class Cache:
        name = "embeddings:x"

        def encode_texts(self) -> None: ...

    with pytest.raises(UsageError, match="no open_clip or Hugging Face dual encoder"):
        ForeignSubject(Cache())


def test_the_recorded_command_names_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "/a/bin/pocketvlm", "--from", "hf:/a/b/model", "--from", "open_clip:/a/c.json@/a/d/w.pt",
        "--out=/a/run", "/a/x", "openmoji?pool=test&fold=0", "https://host/a/b", "hf:org/name", "runs/mine",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", given)
    assert numerics.command_line() == (
        "pocketvlm --from hf:model --from open_clip:c.json@w.pt --out=run x openmoji?pool=test&fold=0 https://host/a/b "
        "hf:org/name runs/mine"
    )


def test_wide_constants_take_the_value_by_position_or_by_name() -> None:
    lowest = torch.finfo(torch.float64).min
    with numerics.WideConstants():
        assert torch.full((2,), lowest).dtype == torch.float64
        assert torch.full((2,), fill_value=lowest).dtype == torch.float64
        assert torch.full(size=(2,), fill_value=1).dtype == torch.int64
        assert torch.full((2,), fill_value=0.5, dtype=torch.float32).dtype == torch.float32


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_spread_over_cores_have_the_bits_of_a_plain_loop(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = StudentSubject(toy.toy_student()).runner(dtype, torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    default, before = torch.get_default_dtype(), torch.get_num_threads()
    results = {}
    with strict_numerics(torch.device("cpu")):
        for cores in (1, 2, 5):
            monkeypatch.setattr(numerics, "_cores", lambda cores=cores: cores)
            results[cores] = [
                encode_rows(runner, "image", pixels, inside=mode) for mode in (torch.no_grad, EmulatedTF32)
            ]
    for cores in (2, 5):
        for alone, together in zip(results[1], results[cores]):
            np.testing.assert_array_equal(alone.view(np.int64), together.view(np.int64))
    if dtype == torch.float32:
        assert not np.array_equal(*results[5]), "emulation reaches the workers"
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (default, before)


def test_workers_are_several_and_have_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_cores", lambda: 3)
    meet = threading.Barrier(3, timeout=20)

    def step(item: int) -> tuple[int, int]:
        meet.wait()
        return item, torch.get_num_threads()

    torch.set_num_threads(2)
    with strict_numerics(torch.device("cpu")):
        assert spread(step, range(3)) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)

    def fail(item: int) -> None:
        raise UsageError(f"item {item}")

    with pytest.raises(UsageError, match="item 0"):
        spread(fail, range(3))


def test_an_operator_that_rounds_on_the_way_is_named() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with NarrowOperators() as seen:
        _ = torch.softmax(x, 0, dtype=torch.float32).double() + x
    assert "softmax float32" in seen.found
    assert {name.split()[-1] for name in seen.found} == {"float32"}
