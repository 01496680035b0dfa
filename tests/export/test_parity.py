"""A good bundle passes; then one thing at a time is sabotaged, and each is caught at the stage where it belongs."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.export import parity_stages
from pocketvlm.export.parity import check_parity, pooled_task_bound, write_parity_summary
from pocketvlm.export.parity_report import print_report, render_html
from pocketvlm.export.reference import record_reference
from pocketvlm.export.reference_run import sha256
from pocketvlm.export.targets.base import Towers
from pocketvlm.export.targets.coreml import CoreMLTarget
from pocketvlm.students import deploy_image, deploy_text

_spec = importlib.util.spec_from_file_location("toy_parity", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

NORMALISE = [helper.make_node("LpNormalization", ["tampered"], ["embedding"], axis=-1, p=2)]


@pytest.fixture(scope="module")
def student() -> Any:
    return toy.toy_student()


@pytest.fixture(scope="module")
def reference(student: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "reference"
    record_reference(student, folder, data=toy.toy_data(), device="cpu")
    return folder


@pytest.fixture(scope="module")
def good(student: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(student, tmp_path_factory.mktemp("parity") / "bundle")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def _contract(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bundle.json").read_text())["contract"]


def _edit(path: Path, change: Callable[[onnx.ModelProto], None], out: Path | None = None) -> None:
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(out or path))


def _append(nodes: list[onnx.NodeProto]) -> Callable[[onnx.ModelProto], None]:
    """Rename the graph's result to `honest` and let `nodes` make `embedding` out of it."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == "embedding":
                        names[index] = "honest"
        model.graph.node.extend(nodes)

    return change


def _constant(name: str, value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, TensorProto.FLOAT, [], [value]))


def _disturb(amount: float, frequency: float) -> list[onnx.NodeProto]:
    """embedding = unit(honest + amount * sin(frequency * honest)): another small error for every input."""
    return [
        _constant("amount", amount),
        _constant("frequency", frequency),
        helper.make_node("Mul", ["honest", "frequency"], ["phase"]),
        helper.make_node("Sin", ["phase"], ["wave"]),
        helper.make_node("Mul", ["wave", "amount"], ["error"]),
        helper.make_node("Add", ["honest", "error"], ["tampered"]),
        *NORMALISE,
    ]


def _as_int8(folder: Path, amount: float, frequency: float = 40.0) -> None:
    """Add a variant that calls itself int8: the fp32 graphs with a disturbance of the given size."""
    for tower in ("image", "text"):
        source, out = folder / f"onnx/{tower}-fp32.onnx", folder / f"onnx/{tower}-int8.onnx"
        _edit(source, _append(_disturb(amount, frequency)), out)
    toy.sign(folder, variants=[toy.variant(), toy.variant(precision="int8")])


def _failed(folder: Path, reference: Path, stage: str, precision: str = "fp32") -> Any:
    """Check, and insist that `stage` is the first to fail and that nothing looks green."""
    report = check_parity(folder, reference)
    assert report.status == "fail"
    assert report.exit_code == 1
    variant = report.variant("onnx", precision)
    assert (variant.status, variant.failed_stage) == ("fail", stage), variant.message
    assert report.failed_stage == stage
    return variant


# --- the good bundle ----------------------------------------------------------------------------------------------


def test_a_good_bundle_passes_every_stage(good: Path, reference: Path, tmp_path: Path) -> None:
    report = check_parity(good, reference, out=tmp_path / "report")
    assert report.status == "pass", report.message
    assert report.exit_code == 0
    (variant,) = report.variants
    assert [stage.stage for stage in variant.stages] == ["S0", "S1", "S2", "S4", "S5"]
    image = variant.stage("S2").details["image"]
    assert image["one_minus_cosine_max"] < 1e-9
    assert image["rows"] > 60
    saved = json.loads((tmp_path / "report/parity.json").read_text())
    assert saved["status"] == "pass"
    assert saved["variants"][0]["stages"][2]["checks"]


def test_summary_goes_into_the_bundle_and_the_bundle_still_loads(bundle: Path, reference: Path) -> None:
    report = check_parity(bundle, reference)
    write_parity_summary(bundle, report)
    (entry,) = Bundle.load(bundle).parity
    assert entry["status"] == "pass"
    assert entry["stages"] == {"S0": "pass", "S1": "pass", "S2": "pass", "S4": "pass", "S5": "pass"}
    assert entry["image"]["cosine_min"] > 0.999999
    assert check_parity(bundle, reference).status == "pass"


def test_summary_is_refused_for_another_model_or_changed_files(bundle: Path, reference: Path) -> None:
    report = check_parity(bundle, reference)
    other = copy.copy(report)
    other.model = "someone-else"
    with pytest.raises(UsageError, match="false promise"):
        write_parity_summary(bundle, other)
    path = bundle / "onnx/text-fp32.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    toy.sign(bundle)
    with pytest.raises(UsageError, match="changed since it was checked"):
        write_parity_summary(bundle, report)


# --- S0: bytes to pixels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [("filter", "bicubic"), ("resize", "squash"), ("background", [0, 0, 0])])
def test_wrong_preprocessing_is_s0(bundle: Path, reference: Path, field: str, value: Any) -> None:
    contract = _contract(bundle)
    contract["image"][field] = value
    toy.sign(bundle, contract=contract)
    assert field in _failed(bundle, reference, "S0").message


def test_swapped_channels_in_preprocessing_are_s0(
    bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = parity_stages.load_image
    monkeypatch.setattr(parity_stages, "load_image", lambda source, spec: honest(source, spec)[..., ::-1])
    assert "differs in" in _failed(bundle, reference, "S0").message


# --- S1: text to ids ----------------------------------------------------------------------------------------------


def test_a_changed_pad_id_is_s1(bundle: Path, reference: Path) -> None:
    contract = _contract(bundle)
    contract["text"]["pad_id"] = 1
    toy.sign(bundle, contract=contract)
    assert "pad_id is 1" in _failed(bundle, reference, "S1").message


def test_one_changed_token_id_is_s1(bundle: Path, reference: Path) -> None:
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["b"], vocabulary["c"] = vocabulary["c"], vocabulary["b"]
    (bundle / "tokenizer.json").write_text(json.dumps(tokenizer))
    contract = _contract(bundle)
    contract["text"]["tokenizer_sha256"] = sha256((bundle / "tokenizer.json").read_bytes())
    toy.sign(bundle, contract=contract)
    variant = _failed(bundle, reference, "S1")
    assert variant.stage("S1").details["different"] > 0


def test_a_tokenizer_that_is_not_the_contracts_is_s1(bundle: Path, reference: Path) -> None:
    path = bundle / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    toy.sign(bundle)
    assert "the model was built with" in _failed(bundle, reference, "S1").message


# --- S2: the full-precision graph ---------------------------------------------------------------------------------


def test_swapped_channels_in_the_graph_are_s2(bundle: Path, reference: Path) -> None:
    def swap(model: onnx.ModelProto) -> None:
        order = numpy_helper.from_array(np.array([2, 1, 0], np.int64), "order")
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == "pixels":
                    node.input[index] = "swapped"
        model.graph.initializer.append(order)
        model.graph.node.insert(0, helper.make_node("Gather", ["pixels", "order"], ["swapped"], axis=3))

    _edit(bundle / "onnx/image-fp32.onnx", swap)
    toy.sign(bundle)
    assert _failed(bundle, reference, "S2").message.startswith("S2 (full-precision graph): image")


def test_an_output_that_is_not_normalised_is_s2_although_its_cosine_is_perfect(bundle: Path, reference: Path) -> None:
    nodes = [_constant("three", 3.0), helper.make_node("Mul", ["honest", "three"], ["embedding"])]
    _edit(bundle / "onnx/text-fp32.onnx", _append(nodes))
    toy.sign(bundle)
    checks = {(c.where, c.metric): c for c in _failed(bundle, reference, "S2").stage("S2").checks}
    assert checks["text", "one_minus_cosine_max"].status == "pass"
    assert checks["text", "norm_error"].value == pytest.approx(2, abs=1e-3)


def test_a_forgotten_attention_mask_is_s2(student: Any, bundle: Path, reference: Path) -> None:
    tower = deploy_text(student)
    tower.tower.pad_id = -1
    toy.export_tower(student, "text", bundle / "onnx/text-fp32.onnx", tower)
    toy.sign(bundle)
    assert "S2 (full-precision graph): text" in _failed(bundle, reference, "S2").message


def test_nan_in_the_weights_is_s2(bundle: Path, reference: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        weights = [w for w in model.graph.initializer if w.data_type == TensorProto.FLOAT and len(w.dims) > 1]
        value = numpy_helper.to_array(weights[-1]).copy()
        value.flat[0] = np.nan
        weights[-1].CopyFrom(numpy_helper.from_array(value, weights[-1].name))

    _edit(bundle / "onnx/image-fp32.onnx", poison)
    toy.sign(bundle)
    assert "non-finite" in _failed(bundle, reference, "S2").message


def test_a_truncated_model_file_fails_by_its_hash_and_by_its_content(bundle: Path, reference: Path) -> None:
    path = bundle / "onnx/image-fp32.onnx"
    path.write_bytes(path.read_bytes()[:2000])
    report = check_parity(bundle, reference)
    assert (report.status, report.failed_stage, report.exit_code) == ("fail", "bundle", 1)
    assert "onnx/image-fp32.onnx" in report.message
    toy.sign(bundle)
    assert "cannot load image-fp32.onnx" in _failed(bundle, reference, "S2").message


@pytest.mark.parametrize("target", ["tflite", "executorch"])
def test_a_variant_that_nothing_can_run_fails(bundle: Path, reference: Path, target: str) -> None:
    entry = toy.variant(target, image="onnx/image-fp32.onnx", text="onnx/text-fp32.onnx")
    toy.sign(bundle, variants=[toy.variant(), entry])
    report = check_parity(bundle, reference)
    assert report.variant("onnx", "fp32").status == "pass"
    assert (report.status, report.variant(target, "fp32").failed_stage) == ("fail", "S2")


def test_an_unknown_precision_has_no_budget_and_fails(bundle: Path, reference: Path) -> None:
    files = {"image": "onnx/image-fp32.onnx", "text": "onnx/text-fp32.onnx"}
    toy.sign(bundle, variants=[toy.variant(precision="int2", **files)])
    assert "int2" in _failed(bundle, reference, "S3", "int2").message


# --- S3: the chosen precision -------------------------------------------------------------------------------------


def test_too_much_quantisation_noise_is_s3_and_not_the_fp32_graphs_fault(bundle: Path, reference: Path) -> None:
    _as_int8(bundle, 0.08)
    variant = _failed(bundle, reference, "S3", "int8")
    assert variant.stage("S2").status == "pass"
    assert check_parity(bundle, reference, targets=["onnx:fp32"]).status == "pass"


def test_int8_within_budget_on_few_queries_is_undecided_and_never_green(bundle: Path, reference: Path) -> None:
    _as_int8(bundle, 1e-7)
    report = check_parity(bundle, reference)
    assert (report.status, report.exit_code) == ("undecided", 0)
    variant = report.variant("onnx", "int8")
    assert [stage.status for stage in variant.stages] == ["pass", "pass", "pass", "pass", "pass", "undecided"]
    assert "fewer than the 268 queries" in variant.message
    assert "parity undecided" in report.message


# --- Core ML: structure only ---------------------------------------------------------------------------------------


def _add_coreml(student: Any, folder: Path) -> None:
    towers = Towers(deploy_image(student), deploy_text(student), student.contract)
    written = CoreMLTarget().lower(towers, precision="fp16", folder=folder, calibration=None)
    toy.sign(folder, variants=[toy.variant(), toy.variant("coreml", "fp16", **written.files)])


def test_core_ml_is_checked_for_structure_and_never_shown_as_a_numeric_pass(
    student: Any, bundle: Path, reference: Path
) -> None:
    _add_coreml(student, bundle)
    report = check_parity(bundle, reference)
    variant = report.variant("coreml", "fp16")
    assert variant.status == "structure-only", variant.message
    assert "numerics not run here" in variant.message
    assert [stage.status for stage in variant.stages] == [
        "pass",
        "pass",
        "not-run",
        "structure-only",
        "not-run",
        "not-run",
    ]
    text = variant.stage("S3").details["text"]
    assert text["weights_found"] == text["weights"] > 3
    assert report.status == "pass"
    assert "structure only" in report.message
    alone = check_parity(bundle, reference, targets=["coreml"])
    assert (alone.status, alone.exit_code) == ("structure-only", 1)


def test_core_ml_weights_of_another_model_are_s3(bundle: Path, reference: Path) -> None:
    _add_coreml(toy.toy_student(seed=5), bundle)
    variant = check_parity(bundle, reference).variant("coreml", "fp16")
    assert (variant.status, variant.failed_stage) == ("fail", "S3")
    assert "holds none of the" in variant.message


def test_core_ml_without_its_weights_file_is_s3(student: Any, bundle: Path, reference: Path) -> None:
    _add_coreml(student, bundle)
    weights = next((bundle / "coreml").glob("text*/Data/*/weights/weight.bin"))
    weights.write_bytes(weights.read_bytes()[:200])
    toy.sign(bundle)
    assert check_parity(bundle, reference).variant("coreml", "fp16").failed_stage == "S3"


# --- S4: end to end -----------------------------------------------------------------------------------------------


def test_a_fault_in_edge_model_alone_is_s4(bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketvlm.edge import model

    honest = model.load_image
    monkeypatch.setattr(model, "load_image", lambda source, spec: honest(source, spec)[..., ::-1].copy())
    assert "S4 (end to end): image" in _failed(bundle, reference, "S4").message


def test_an_edge_model_that_accepts_broken_pictures_is_s4(
    bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm.edge import model
    from pocketvlm.edge.errors import BadSampleError

    honest = model.load_image

    def lenient(source: Any, spec: Any) -> Any:
        try:
            return honest(source, spec)
        except BadSampleError:
            return np.zeros((spec.size, spec.size, 3), np.uint8)

    monkeypatch.setattr(model, "load_image", lenient)
    assert "must be refused as 'truncated-image' and was embedded" in _failed(bundle, reference, "S4").message


# --- S5: the task -------------------------------------------------------------------------------------------------


def test_good_cosine_with_broken_rankings_is_s5(bundle: Path, reference: Path) -> None:
    _as_int8(bundle, 0.012, 3000.0)
    variant = _failed(bundle, reference, "S5", "int8")
    assert variant.stage("S3").status == "pass"
    assert variant.stage("S3").details["image"]["cosine_mean"] > 0.995
    failed = {check.metric for check in variant.stage("S5").checks if check.status == "fail"}
    assert "top10_overlap" in failed
    assert variant.worst
    assert variant.worst[0].why.startswith("the first result changed")


# --- before any graph runs ----------------------------------------------------------------------------------------


def test_another_students_reference_is_refused(bundle: Path, reference: Path) -> None:
    contract = _contract(bundle)
    contract["model_id"] = "toy-0000000000000000"
    toy.sign(bundle, contract=contract)
    report = check_parity(bundle, reference)
    assert (report.status, report.failed_stage) == ("fail", "identity")
    assert "different models" in report.message
    assert not report.variants


def test_a_broken_or_absent_reference_fails_and_says_so_in_the_report(
    good: Path, reference: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(reference, tmp_path / "broken"))
    (broken / "noise.json").unlink()
    for folder, words in ((broken, "lacks noise.json"), (tmp_path / "absent", "nothing was proved")):
        out = tmp_path / f"report-{folder.name}"
        report = check_parity(good, folder, out=out)
        assert (report.status, report.failed_stage, report.exit_code) == ("fail", "reference", 1)
        assert words in report.message
        assert json.loads((out / "parity.json").read_text())["status"] == "fail"
        assert words in (out / "parity.html").read_text()


def test_empty_cases_fail(good: Path, reference: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(reference, tmp_path / "empty"))
    data = json.dumps({"images": [], "texts": []}).encode()
    (folder / "cases/cases.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["cases/cases.json"]["sha256"] = sha256(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = check_parity(good, folder)
    assert (report.status, report.failed_stage) == ("fail", "reference")
    assert "would pass anything" in report.message


def test_a_bundle_without_variants_proves_nothing(bundle: Path, reference: Path) -> None:
    toy.sign(bundle, variants=[])
    report = check_parity(bundle, reference)
    assert (report.status, report.exit_code) == ("fail", 1)


def test_wrong_arguments_are_refused(good: Path, reference: Path) -> None:
    with pytest.raises(UnknownNameError, match="onnx"):
        check_parity(good, reference, targets=["onxx"])
    with pytest.raises(UsageError, match="check nothing"):
        check_parity(good, reference, targets=[])
    with pytest.raises(UsageError, match="inside the bundle"):
        check_parity(good, reference, out=good / "report")


# --- pooling ------------------------------------------------------------------------------------------------------


def _fold(report: dict[str, Any], fold: int) -> dict[str, Any]:
    other = copy.deepcopy(report)
    other["queries"] = {key: [f"{fold}/{name}" for name in names] for key, names in other["queries"].items()}
    return other


def test_pooled_folds_decide_what_one_fold_cannot(bundle: Path, reference: Path) -> None:
    _as_int8(bundle, 1e-7)
    one = check_parity(bundle, reference).to_dict()
    single = {(row.precision, row.direction, row.k): row for row in pooled_task_bound([one])}
    assert single["int8", "image-to-text", 5].status == "undecided"
    pooled = {
        (row.precision, row.direction, row.k): row for row in pooled_task_bound([_fold(one, i) for i in range(7)])
    }
    row = pooled["int8", "image-to-text", 5]
    assert (row.status, row.change.queries, row.distinct, row.method) == ("pass", 280, 280, "tango")
    assert row.change.bound <= 0.01
    assert pooled["fp32", "image-to-text", 5].status == "pass"


def test_the_same_queries_twice_are_no_further_evidence(bundle: Path, reference: Path) -> None:
    _as_int8(bundle, 1e-7)
    one = check_parity(bundle, reference).to_dict()
    rows = {(row.precision, row.direction, row.k): row for row in pooled_task_bound([one] * 7)}
    row = rows["int8", "image-to-text", 5]
    assert (row.change.queries, row.distinct, row.method) == (280, 40, "cluster bootstrap")
    assert row.status == "undecided"
    assert row.change.bound > 0.05


def test_a_failed_run_cannot_hide_in_a_pool(bundle: Path, reference: Path) -> None:
    good = check_parity(bundle, reference).to_dict()
    path = bundle / "onnx/image-fp32.onnx"
    path.write_bytes(path.read_bytes()[:2000])
    toy.sign(bundle)
    with pytest.raises(UsageError, match="has no task result"):
        pooled_task_bound([good, check_parity(bundle, reference).to_dict()])
    with pytest.raises(UsageError, match="nothing to pool"):
        pooled_task_bound([])


# --- for people ---------------------------------------------------------------------------------------------------


def test_reports_show_the_failure_the_pictures_and_nothing_from_outside(
    bundle: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _as_int8(bundle, 0.012, 3000.0)
    report = check_parity(bundle, reference)
    page = render_html(report)
    assert "data:image/png;base64," in page
    assert "the first result changed" in page
    assert "top-10 overlap" in page
    assert "CC0-1.0" in page
    assert "http" not in page.replace("http-equiv", "")
    print_report(report)
    out = capsys.readouterr().out
    assert "onnx int8" in out
    assert "parity failed" in out
