"""The bundle appears complete or not at all, says where it came from, and what it lists is what it holds."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.data.source import DataSource
from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.conformance import check_conformance
from pocketvlm.edge.errors import IntegrityError, MissingExtraError, UnknownNameError, UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export import bundle as writer
from pocketvlm.export.bundle import export_bundle, format_table, summarize
from pocketvlm.export.calibration import build_calibration, open_calibration, stratified
from pocketvlm.export.source import Exportable, open_source
from pocketvlm.export.targets.executorch import ExecuTorchTarget
from pocketvlm.export.targets.executorch_writer import BackgroundWriter
from pocketvlm.export.targets.onnx import OnnxTarget
from pocketvlm.students import build_student, save_student, train_tokenizer

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

WORDS = "red green blue circle square bar picture of a the dog 0123456789"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_data(count: int = 80, labels: int = 8, name: str = "toy") -> DataSource:
    samples = []
    for index, pixels in enumerate(toy.pictures(count, 11)):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        label = f"class {index % labels}"
        caption = Caption(f"a {['red', 'green', 'blue'][index % 3]} {['bar', 'circle'][index % 2]} {index}")
        samples.append(Sample(f"toy/{index}", ImageRef(data=buffer.getvalue()), (caption,), label=label))
    return DataSource(name, samples, licences=(("toy pictures", "CC0-1.0", "pocketvlm's tests"),))


@pytest.fixture(scope="module")
def model() -> Exportable:
    towers = toy.toy_towers()
    data = train_tokenizer([WORDS] * 3, 300)
    text = replace(towers.contract.text, tokenizer_sha256=hashlib.sha256(data).hexdigest())
    towers = replace(towers, contract=replace(towers.contract, text=text))
    return Exportable(towers, data, (("toy weights", "Apache-2.0", "nobody"),), {"recipe": "train: {steps: 3}\n"})


@pytest.fixture(scope="module")
def bundle(model: Exportable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    targets = ("onnx", "executorch:fp32", "coreml:fp16")
    lines: list[str] = []
    assert export_bundle(model, out, targets, calibration_data=make_data(), progress=lines.append) == out
    assert any("onnx int8" in line for line in lines)
    return out


def test_the_reader_takes_it_and_every_file_is_vouched_for(bundle: Path, model: Exportable) -> None:
    opened = Bundle.load(bundle)
    assert opened.contract == model.towers.contract
    assert [(v.target, v.precision) for v in opened.variants] == [
        ("onnx", "fp32"),
        ("onnx", "int8"),
        ("executorch", "fp32"),
        ("coreml", "fp16"),
    ]
    listed = opened.raw["files"]
    on_disk = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()} - {"bundle.json"}
    assert set(listed) == on_disk
    for name, entry in listed.items():
        data = (bundle / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert (bundle / "tokenizer.json").read_bytes() == model.tokenizer_json
    assert not [p for p in bundle.parent.iterdir() if p != bundle], "no scratch folder stays behind"


def test_one_precision_of_a_target_from_export_to_embedding(model: Exportable, tmp_path: Path) -> None:
    lines: list[str] = []
    out = export_bundle(
        model, tmp_path / "b", ("onnx:w8a8-dynamic", "onnx:w4"), calibration_data=make_data(), progress=lines.append
    )
    opened = Bundle.load(out)
    assert [(v.target, v.precision) for v in opened.variants] == [("onnx", "w8a8-dynamic"), ("onnx", "w4")]
    for variant in opened.variants:
        notes = variant.notes
        assert notes["image"]["scheme"]
        assert notes["image"]["biases"] == "corrected"
        assert 0.9 < notes["image"]["held_out_cosine_mean"] < 1
        assert 0.5 < notes["vectors_mean_cosine"]["text"] <= 1
        assert notes["bytes"] > 0
        rows = EdgeModel.load(opened, precision=variant.precision).embed_text(["a red circle", "blue"])
        assert rows.shape == (2, toy.DIM)
        for stage in check_conformance(opened, "onnxruntime", variant.precision):
            assert stage.passed, stage
    assert EdgeModel.load(opened).variant.precision == "w8a8-dynamic", "the most faithful of the two"


def test_a_process_of_its_own_writes_the_same_program(model: Exportable, tmp_path: Path) -> None:
    calibration = build_calibration(make_data(), model.towers.contract, model.tokenizer())
    how: Any = {"precision": "int8", "calibration": calibration}
    here, there = (tmp_path / name for name in ("here", "there"))
    with BackgroundWriter() as other:
        variant = ExecuTorchTarget(other.write).lower(model.towers, folder=there, **how)
        expected = ExecuTorchTarget().lower(model.towers, folder=here, **how)
        other.finish()
    assert variant == expected, "with what the backend took over, which is known in the end"
    assert (there / variant.files["text"]).read_bytes() == (here / variant.files["text"]).read_bytes()


def test_a_program_that_another_process_cannot_write_leaves_no_bundle(
    model: Exportable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.export.save", lambda program, path: Path(path).write_bytes(b"no program"))
    with pytest.raises(UsageError, match=r"executorch cannot express 'toy' \(.*no bundle was written"):
        export_bundle(model, tmp_path / "out", ("onnx:fp32", "executorch:fp32"), processes=2)
    assert not list(tmp_path.iterdir())


def test_provenance_and_licences_travel(bundle: Path, model: Exportable) -> None:
    raw = json.loads((bundle / "bundle.json").read_text())
    provenance = raw["provenance"]
    assert provenance["recipe"] == "train: {steps: 3}\n"
    assert provenance["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "toy: 80 pictures spread over 8 labels" in provenance["calibration"]
    assert [row["what"] for row in raw["licences"]] == ["toy weights", "toy pictures"]
    assert raw["contract_sha256"] == model.towers.contract.digest()
    # no folder of this machine
    assert str(bundle.parent) not in (bundle / "bundle.json").read_text()


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "int8")])
def test_its_own_vectors_hold(bundle: Path, backend: Any, precision: str) -> None:
    stages = check_conformance(bundle, backend, precision)
    assert stages[-1].stage == "S5 retrieval"
    for stage in stages:
        assert stage.passed, stage
        assert stage.cases >= (2 if "refused" in stage.stage else 3 if stage.stage == "S0 resize" else 10)


def test_table_has_sizes_ratios_and_times(bundle: Path) -> None:
    rows = {(row.target, row.precision): row for row in summarize(bundle)}
    assert rows["onnx", "fp32"].ratio == 1.0
    assert rows["onnx", "int8"].ratio < 0.6
    size = sum((bundle / name).stat().st_size for name in rows["onnx", "int8"].files)
    assert rows["onnx", "int8"].mb == pytest.approx(size / 1e6)
    assert set(rows["executorch", "fp32"].latency_ms) == {"image", "text"}
    assert rows["coreml", "fp16"].ratio < 0.7, "against four bytes per parameter, as no fp32 package was written"
    text = format_table(list(rows.values()))
    assert text.splitlines()[0].split()[:4] == ["target", "precision", "file", "MB"]
    assert len(text.splitlines()) == 5 + 2
    assert "executorch fp32 encode_text: " in text.splitlines()[-1]


def test_a_student_folder_and_a_run_folder_can_be_exported(tmp_path: Path) -> None:
    student = build_student(
        "timm:test_efficientnet",
        embed_dim=16,
        tokenizer_json=train_tokenizer([WORDS], 200),
        overrides={"image.size": 32, "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 8}, "dims": (4,)},
    )
    save_student(student, tmp_path / "run" / "student")
    (tmp_path / "run" / "recipe.yaml").write_text("name: x\nstudent:\n  init: /a/b/init\n")
    facts = {
        "teacher": {"name": "hf:/a/b/t", "fingerprint": "f" * 64},
        "data": {"train": {"name": "openmoji"}},
        "licences": [["teacher weights", "MIT", "them"]],
        "packages": {"torch": "2"},
        "command": "pocketvlm distill quick data.train=/a/b/x.jsonl",
    }
    (tmp_path / "run" / "environment.json").write_text(json.dumps(facts))
    opened = open_source(tmp_path / "run")
    assert opened.provenance["teacher"]["fingerprint"] == "f" * 64
    assert opened.provenance["data"] == "openmoji"
    assert opened.provenance["recipe"] == "name: x\nstudent:\n  init: init\n"
    assert "/a" not in json.dumps(opened.provenance), "no folder of the machine that trained it"
    assert "/a/b/init" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert ("teacher weights", "MIT", "them") in opened.licences
    assert open_source(student).towers.contract == opened.towers.contract
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    with torch.no_grad():
        found = opened.towers.image(pixels)  # type: ignore[misc]
        expected = torch.nn.functional.normalize(student.eval().encode_image(pixels).embedding, dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # promised prefixes travel, and the runtime cuts to them
    cut = EdgeModel.load(export_bundle(opened, tmp_path / "bundle", ("onnx:fp32",)), dim=4)
    assert cut.contract.dims == (4, 16)
    short = torch.nn.functional.normalize(expected[:, :4], dim=-1).numpy()
    np.testing.assert_allclose(cut.embed_pixels(pixels.numpy()), short, atol=1e-5)


# --- failing closed -------------------------------------------------------------------------------------------------


def test_output_is_not_overwritten_unasked(model: Exportable, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        export_bundle(model, out, ("onnx:fp32",))
    with pytest.raises(UsageError, match=r"holds files but no bundle\.json"):
        export_bundle(model, out, ("onnx:fp32",), overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        export_bundle(model, file, ("onnx:fp32",))


def test_a_failure_leaves_the_previous_bundle_and_no_scratch(
    model: Exportable, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)
    before = (out / "bundle.json").read_bytes()

    def broken(self: Any, towers: Any, *, folder: Path, **rest: Any) -> Any:
        (folder / "half.onnx").write_bytes(b"0" * 99)
        raise NotImplementedError("aten.strange has no conversion\nand more")

    monkeypatch.setattr(OnnxTarget, "lower", broken)
    with pytest.raises(UsageError, match=r"onnx fp32 cannot express 'toy' .*aten\.strange") as caught:
        export_bundle(model, out, ("onnx:fp32",), overwrite=True)
    assert "\n" not in str(caught.value)
    assert (out / "bundle.json").read_bytes() == before
    Bundle.load(out)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_full_disk_leaves_nothing(model: Exportable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, towers: Any, **rest: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OnnxTarget, "lower", full)
    with pytest.raises(UsageError, match="No space left on device"):
        export_bundle(model, tmp_path / "out", ("onnx:fp32",))
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_everything(model: Exportable, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)
    export_bundle(model, out, ("onnx:fp32",), overwrite=True)
    opened = Bundle.load(out)
    assert [(v.target, v.precision) for v in opened.variants] == [("onnx", "fp32")]
    assert not (out / "coreml").exists()


def test_a_file_that_computes_something_else_stops_the_export(
    model: Exportable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = OnnxTarget.lower

    def other(self: Any, towers: Any, **rest: Any) -> Any:
        towers = replace(towers, text=toy.TextToy().eval())
        return genuine(self, towers, **rest)

    monkeypatch.setattr(OnnxTarget, "lower", other)
    with pytest.raises(IntegrityError, match="text tower of onnx fp32, run from its file"):
        export_bundle(model, tmp_path / "out", ("onnx:fp32",))
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_load_stops_the_export(
    model: Exportable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = OnnxTarget.lower

    def damaged(self: Any, towers: Any, *, folder: Path, **rest: Any) -> Any:
        variant = genuine(self, towers, folder=folder, **rest)
        path = folder / variant.files["image"]
        path.write_bytes(path.read_bytes()[:-2000])
        return variant

    monkeypatch.setattr(OnnxTarget, "lower", damaged)
    with pytest.raises(IntegrityError, match="do not run when read back from disk"):
        export_bundle(model, tmp_path / "out", ("onnx:fp32",))


def test_requests_that_cannot_be_met_are_refused_before_any_work(
    model: Exportable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "open_source", lambda *a, **k: pytest.fail("work began"))
    with pytest.raises(UnknownNameError, match="did you mean 'coreml'"):
        export_bundle(model, tmp_path / "o", ("core-ml",))
    with pytest.raises(UsageError, match=r"looks weights up in a table.*it would be missing from the bundle"):
        export_bundle(model, tmp_path / "o", ("onnx:palette4",))
    with pytest.raises(UsageError, match="'palette6' was asked for"):
        export_bundle(model, tmp_path / "o", ("coreml", "onnx"), precisions=("palette6",))
    with pytest.raises(UsageError, match="no chosen target writes precision palette6: onnx writes fp32, fp16"):
        export_bundle(model, tmp_path / "o", ("onnx",), precisions=("fp32", "palette6"))
    for targets, precisions in ((("onnx",), ("fp32", "w8a8-dynamc")), (("onnx:w8a8-dynamc",), None)):
        with pytest.raises(UnknownNameError, match="did you mean 'w8a8-dynamic'"):
            export_bundle(model, tmp_path / "o", targets, precisions=precisions)
    with pytest.raises(UsageError, match="no target was chosen"):
        export_bundle(model, tmp_path / "o", ())

    def missing(name: str) -> Any:
        raise MissingExtraError("this needs the package 'executorch'; pip install 'pocketvlm[executorch]'")

    monkeypatch.setattr("pocketvlm.export.wanted.get_target", missing)
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[executorch\]"):
        export_bundle(model, tmp_path / "o", ("executorch",))


def test_int8_without_data_is_refused_and_private_pictures_stay_private(
    model: Exportable, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="without calibration data"):
        export_bundle(model, tmp_path / "out", ("onnx:int8",))
    shipped = {hashlib.sha256(p.read_bytes()).hexdigest() for p in (bundle / "conformance/images").iterdir()}
    mine = {hashlib.sha256(sample.image.read()).hexdigest() for sample in make_data()}
    assert not shipped & mine
    # a name proves nothing: any folder may be called so
    assert writer._examples(make_data(40, name="openmoji")) == []
    source = make_data(40)
    public = writer._examples(dataclasses.replace(source, licences=(("OpenMoji 17 pictures", "CC BY-SA 4.0", "x"),)))
    assert len(public) == 8
    assert all(case.real and case.caption for case in public)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_is_stable_stratified_and_stated(model: Exportable) -> None:
    data, tokenizer = make_data(80, labels=5), model.tokenizer()
    assert isinstance(tokenizer, Tokenizer)
    first = build_calibration(data, model.towers.contract, tokenizer, size=20)
    shuffled = DataSource("toy", list(np.random.default_rng(0).permutation(np.array(data.samples, object))))
    second = build_calibration(shuffled, model.towers.contract, tokenizer, size=20)
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.ids, second.ids)
    assert first.description == second.description
    assert "20 pictures spread over 5 labels" in first.description
    ordered, kind, strata = stratified(data.samples)
    assert (kind, strata) == ("labels", 5)
    assert set(Counter(sample.label for sample in ordered[:20]).values()) == {4}


def test_calibration_counts_unreadable_pictures_and_refuses_too_few(model: Exportable) -> None:
    data, tokenizer = make_data(40), model.tokenizer()
    samples = [replace(s, image=ImageRef(data=b"junk")) if i % 2 else s for i, s in enumerate(data.samples)]
    found = build_calibration(samples, model.towers.contract, tokenizer, size=40, name="half")
    assert len(found.pixels) == 20
    assert "20 unreadable passed over" in found.description
    with pytest.raises(UsageError, match="10 readable pictures"):
        build_calibration(make_data(10), model.towers.contract, tokenizer)
    with pytest.raises(UsageError, match="size 4 is too small"):
        build_calibration(data, model.towers.contract, tokenizer, size=4)


def test_few_or_one_kind_of_picture_is_said_with_its_consequence(model: Exportable, tmp_path: Path) -> None:
    contract, tokenizer = model.towers.contract, model.tokenizer()
    assert build_calibration(make_data(80), contract, tokenizer).warnings == ()
    (few,) = build_calibration(make_data(40), contract, tokenizer).warnings
    assert few.startswith("40 pictures of 'toy' calibrate and judge; ranges rest on few")
    (alike,) = build_calibration(make_data(80, labels=1, name="one"), contract, tokenizer).warnings
    assert "all pictures of 'one' are of one class ('class 0')" in alike
    assert "clipped" in alike
    # without labels nothing is known of classes
    bare = DataSource("bare", [replace(sample, label=None) for sample in make_data(80).samples])
    assert build_calibration(bare, contract, tokenizer).warnings == ()
    lines: list[str] = []
    towers = replace(model.towers, text=None, contract=replace(contract, kind="image-labels", text=None))
    image = replace(model, towers=towers, tokenizer_json=None)
    out = export_bundle(
        image, tmp_path / "b", ("onnx:w8",), calibration_data=make_data(20, labels=1), progress=lines.append
    )
    said = [line for line in lines if line.startswith("WARNING: ")]
    assert len(said) == 2
    assert [f"WARNING: {w}" for w in Bundle.load(out).provenance["calibration_warnings"]] == said


def test_data_without_captions_is_calibrated_with_words_and_says_so(model: Exportable) -> None:
    data, tokenizer = make_data(40), model.tokenizer()
    assert isinstance(tokenizer, Tokenizer)
    mute = replace(data, samples=[replace(sample, captions=(), label=None) for sample in data.samples])
    found, source = open_calibration(mute, model.towers.contract, tokenizer, size=30)
    assert found is not None
    assert source is not None
    assert "30 texts (0 of the data, 30 of the word list wordfreq-en+" in found.description
    assert len({row.tobytes() for row in found.ids}) > 20
    assert source.licences[0] == data.licences[0]
    assert any("wordfreq" in what for what, _, _ in source.licences)
    few = replace(data, samples=[*data.samples[:10], *mute.samples[10:]])
    assert "(10 of the data, 20 of the" in build_calibration(few, model.towers.contract, tokenizer, size=30).description
    enough, source = open_calibration(data, model.towers.contract, tokenizer, size=30)
    assert enough is not None
    assert "word list" not in enough.description
    assert source is data
