"""A good bundle passes; then one thing at a time is sabotaged, and each is caught at the stage where it belongs."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pocketvlm.cli import main
from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import UnknownNameError, UsageError, VersionError
from pocketvlm.export import parity_stages
from pocketvlm.export.budgets import load_budgets
from pocketvlm.export.parity import check_parity, pooled_task_bound, write_parity_summary
from pocketvlm.export.parity_again import rethreshold
from pocketvlm.export.parity_junit import write_junit
from pocketvlm.export.parity_report import print_report, render_html
from pocketvlm.export.reference_diff import diff_references
from pocketvlm.export.reference_run import load_reference, sha256
from pocketvlm.students import deploy_text

_spec = importlib.util.spec_from_file_location("toy_parity", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

NORMALISE = [helper.make_node("LpNormalization", ["tampered"], ["embedding"], axis=-1, p=2)]


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
    fake = toy.variant(precision="int8") | {"notes": {"weights": "float"}}
    toy.sign(folder, variants=[toy.variant(), fake])


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


@pytest.mark.parametrize("precision", ["w8", "w8a8-dynamic", "w8a8-static", "w4"])
def test_every_precision_is_judged_by_its_own_row(bundle: Path, reference: Path, precision: str) -> None:
    files = {tower: f"onnx/{tower}-fp32.onnx" for tower in ("image", "text")}
    variant = toy.variant(precision=precision, **files) | {"notes": {"weights": "float"}}
    toy.sign(bundle, variants=[toy.variant(), variant])
    stage = check_parity(bundle, reference, targets=[f"onnx:{precision}"]).variant("onnx", precision).stage("S3")
    budgets = load_budgets().for_precision(precision)
    judged = {check.metric: check.limit for check in stage.checks}
    assert judged["one_minus_cosine_mean"] == budgets.metrics["one_minus_cosine_mean"].value
    assert stage.status == "pass"


# --- S4: end to end -----------------------------------------------------------------------------------------------


def test_a_fault_in_edge_model_alone_is_s4(bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketvlm.edge import reading

    honest = reading.load_image
    monkeypatch.setattr(reading, "load_image", lambda source, spec: honest(source, spec)[..., ::-1].copy())
    assert "S4 (end to end): image" in _failed(bundle, reference, "S4").message


def test_an_edge_model_that_accepts_broken_pictures_is_s4(
    bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm.edge import reading
    from pocketvlm.edge.errors import BadSampleError

    honest = reading.load_image

    def lenient(source: Any, spec: Any) -> Any:
        try:
            return honest(source, spec)
        except BadSampleError:
            return np.zeros((spec.size, spec.size, 3), np.uint8)

    monkeypatch.setattr(reading, "load_image", lenient)
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


# --- judged again -------------------------------------------------------------------------------------------------


def _budgets(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    value = json.loads((Path(parity_stages.__file__).parent / "budgets.json").read_text())
    change(value["precisions"])
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(value | {"version": "mine"}))
    return path


def test_judging_again_by_the_same_budgets_changes_nothing(bundle: Path, reference: Path, tmp_path: Path) -> None:
    _as_int8(bundle, 1e-7)
    before = check_parity(bundle, reference, out=tmp_path / "report")
    after = rethreshold(tmp_path / "report/parity.json")
    for one, other in zip(before.variants, after.variants, strict=True):
        assert [(s.stage, s.status, s.message) for s in one.stages] == [
            (s.stage, s.status, s.message) for s in other.stages
        ]
        assert [s.checks for s in one.stages] == [s.checks for s in other.stages]
    assert "Judged again" in render_html(after)
    assert rethreshold(after.to_dict()).to_dict()["variants"] == after.to_dict()["variants"]


def test_judging_again_follows_the_new_limits_both_ways(bundle: Path, reference: Path, tmp_path: Path) -> None:
    _as_int8(bundle, 0.003)
    measured = check_parity(bundle, reference).to_dict()
    assert rethreshold(measured).variant("onnx", "int8").stage("S3").status == "pass"
    strict = _budgets(tmp_path, lambda p: p["int8"]["metrics"]["sqnr_db"].update(value=60.0))
    again = rethreshold(measured, strict)
    assert (again.status, again.failed_stage, again.exit_code) == ("fail", "S3", 1)
    assert "the budget is 60.0 dB; the largest error of its own has" in again.message
    loose = _budgets(tmp_path, lambda p: p["int8"]["metrics"]["sqnr_db"].update(value=10.0, reason="a trial"))
    assert rethreshold(again.to_dict(), loose).variant("onnx", "int8").stage("S3").status == "pass"


def test_judging_again_excuses_no_error(bundle: Path, reference: Path, tmp_path: Path) -> None:
    path = bundle / "onnx/image-fp32.onnx"
    path.write_bytes(path.read_bytes()[:2000])
    toy.sign(bundle)
    measured = check_parity(bundle, reference).to_dict()
    assert "cannot load" in rethreshold(measured).message
    contract = _contract(bundle)
    contract["model_id"] = "toy-0000000000000000"
    toy.sign(bundle, contract=contract)
    assert rethreshold(check_parity(bundle, reference).to_dict()).failed_stage == "identity"


def test_what_a_report_does_not_hold_is_not_judged(good: Path, reference: Path, tmp_path: Path) -> None:
    measured = check_parity(good, reference).to_dict()

    def wider(precisions: dict[str, Any]) -> None:
        precisions["fp32"]["tie"].update(floor=1e-3, reason="a trial")

    with pytest.raises(UsageError, match="near ties"):
        rethreshold(measured, _budgets(tmp_path, wider))
    older = copy.deepcopy(measured)
    stage = older["variants"][0]["stages"][2]
    stage["checks"] = [check for check in stage["checks"] if check["metric"] != "sqnr_db"]
    with pytest.raises(UsageError, match="sqnr_db of onnx fp32"):
        rethreshold(older)
    with pytest.raises(UsageError, match="is no parity"):
        rethreshold({"schema_version": "1.0"})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        rethreshold(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="cannot be read"):
        rethreshold(tmp_path / "absent.json")
    with pytest.raises(VersionError):
        rethreshold(measured | {"schema_version": "2.0"})


def test_junit_shows_each_stage_and_never_green_where_nothing_ran(
    bundle: Path, reference: Path, tmp_path: Path
) -> None:
    _as_int8(bundle, 1e-7)
    report = check_parity(bundle, reference)

    def counts(**options: Any) -> tuple[str, ...]:
        root = ElementTree.parse(write_junit(report, tmp_path / "deep/junit.xml", **options)).getroot()
        return tuple(root.attrib[key] for key in ("tests", "failures", "skipped"))

    # three before any graph runs, five stages of fp32, six of int8, of which the task is undecided
    assert counts() == ("14", "0", "1")
    assert counts(strict=True) == ("14", "1", "0")
    report = check_parity(bundle, tmp_path / "absent")
    assert counts()[1] == "1"
    report.preflight.clear()
    assert counts()[1] == "1"


def test_two_recordings_side_by_side(reference: Path) -> None:
    a, b = load_reference(reference), load_reference(reference)
    assert diff_references(a, b).same
    assert diff_references(a, b).lines()[-1] == "same"
    b.arrays["image"] = b.arrays["image"][:, ::-1].copy()
    b.manifest["sha256"]["weights"] = "0" * 64
    b.taps["image"][1][:, 2:] *= 1.01
    diff = diff_references(a, b)
    assert not diff.same
    assert diff.model[0].startswith("sha256 of weights")
    assert diff.answers["image"]["one_minus_cosine_max"] > 0.1
    assert diff.answers["text"]["one_minus_cosine_max"] == 0
    assert diff.taps["image"]["first"] == a.taps["image"][0][2]
    assert diff.taps["text"]["first"] is None
    b = load_reference(reference)
    b.arrays["ids"] = b.arrays["ids"].copy()
    b.arrays["ids"][3, 1] += 1
    assert diff_references(a, b).inputs == ["1 text cases have other inputs, first 'case real-03'"]
    assert not diff_references(a, b).same


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["parity"], "no bundle"),
        (["parity", "BUNDLE"], "no --reference"),
        (["parity", "BUNDLE", "--reference", "nowhere"], "'nowhere' does not exist"),
        (["parity", "BUNDLE", "--rethreshold", "parity.json"], "runs nothing"),
        (["parity", "BUNDLE", "--reference", "BUNDLE", "--bisect", "onnx:int8", "--out", "x"], "writes no report"),
        (["parity", "BUNDLE", "--reference", "BUNDLE", "--targets", "onnx", "--into-bundle"], "do not check them all"),
        (["reference", "diff", "nowhere", "nowhere"], "no manifest.json"),
    ],
)
def test_what_cannot_be_judged_exits_with_2(
    arguments: list[str], says: str, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(good) if argument == "BUNDLE" else argument for argument in arguments])
    assert left.value.code == 2
    assert says in capsys.readouterr().err.replace("\n", " ")


def test_the_command_judges_again_and_writes_for_ci(
    good: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str | Path) -> Any:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        return left.value.code

    assert run("parity", good, "--reference", reference, "--out", tmp_path / "a", "--junit", tmp_path / "j.xml") == 0
    assert (tmp_path / "j.xml").is_file()
    strict = _budgets(tmp_path, lambda p: p["fp32"]["metrics"]["sqnr_db"].update(value=200.0))
    again = ("parity", "--rethreshold", tmp_path / "a/parity.json")
    assert run(*again) == 0
    assert run(*again, "--budgets", strict, "--out", tmp_path / "b") == 1
    assert json.loads((tmp_path / "b/parity.json").read_text())["failed_stage"] == "S2"
    assert run("reference", "diff", reference, reference) == 0
    capsys.readouterr()


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
