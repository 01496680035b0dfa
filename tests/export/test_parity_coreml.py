"""Parity of Core ML packages: run by the kit's evaluator, weights recognised, a Mac's results refused or judged."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.edge.errors import UsageError
from pocketvlm.export.budgets import load_budgets
from pocketvlm.export.parity import check_parity
from pocketvlm.export.targets.base import Towers
from pocketvlm.export.targets.coreml import CoreMLTarget
from pocketvlm.students import deploy_image, deploy_text

_spec = importlib.util.spec_from_file_location("toy_parity", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def _add_coreml(student: Any, folder: Path) -> None:
    towers = Towers(deploy_image(student), deploy_text(student), student.contract)
    written = CoreMLTarget().lower(towers, precision="fp16", folder=folder, calibration=None)
    toy.sign(folder, variants=[toy.variant(), toy.variant("coreml", "fp16", **written.files)])


def test_core_ml_is_run_by_the_evaluator_which_says_what_it_leaves_open(
    student: Any, bundle: Path, reference: Path, tmp_path: Path
) -> None:
    _add_coreml(student, bundle)
    report = check_parity(bundle, reference, targets=["coreml"], out=tmp_path / "out")
    variant = report.variant("coreml", "fp16")
    assert variant.runtime == "coreml-mil"
    # 40 queries decide nothing, and everything before the task holds
    assert [stage.status for stage in variant.stages] == ["pass", "pass", "not-run", "pass", "pass", "undecided"]
    stage = variant.stage("S3")
    assert stage.details["image"]["sqnr_db"] > 50
    assert {check.metric for check in stage.checks} >= {"sqnr_db", "fp16_headroom"}
    text = stage.details["structure"]["text"]
    assert text["weights_found"] == text["weights"] > 3
    for said in (stage.message, variant.to_dict()["not_modelled"], (tmp_path / "out/parity.html").read_text()):
        assert "how the Neural Engine and GPU add up inside an operation" in said


def test_an_operation_that_the_evaluator_does_not_know_fails_by_name(
    student: Any, bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm.export.mil.ops import OPERATIONS

    _add_coreml(student, bundle)
    monkeypatch.delitem(OPERATIONS, "softmax")
    variant = check_parity(bundle, reference, targets=["coreml"]).variant("coreml", "fp16")
    assert (variant.status, variant.failed_stage) == ("fail", "S3")
    assert "text-fp16.mlpackage has the operation 'softmax'" in variant.message


def test_a_core_ml_graph_that_computes_something_else_is_s3(
    student: Any, bundle: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm.export.mil.ops import OPERATIONS, Arguments

    _add_coreml(student, bundle)
    honest = OPERATIONS["gelu"]
    wrong = {"mode": "SIGMOID_APPROXIMATION"}
    monkeypatch.setitem(OPERATIONS, "gelu", lambda a: honest(Arguments({**a._values, **wrong})))
    variant = check_parity(bundle, reference, targets=["coreml"]).variant("coreml", "fp16")
    assert (variant.status, variant.failed_stage) == ("fail", "S3")


def test_results_of_a_mac_without_a_core_ml_variant_are_refused(bundle: Path, reference: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"kind": "coreml-results", "schema": "1.0", "variants": []}')
    with pytest.raises(UsageError, match=r"results\.json\) and no Core ML variant is checked"):
        check_parity(bundle, reference, coreml_results=path)


def test_core_ml_palettes_are_recognised_and_judged_by_their_own_row(
    student: Any, bundle: Path, reference: Path
) -> None:
    towers = Towers(deploy_image(student), deploy_text(student), student.contract)
    written = CoreMLTarget().lower(towers, precision="palette4", folder=bundle, calibration=None)
    toy.sign(bundle, variants=[toy.variant(), toy.variant("coreml", "palette4", **written.files)])
    variant = check_parity(bundle, reference).variant("coreml", "palette4")
    stage = variant.stage("S3")
    text = stage.details["structure"]["text"]
    limits = {check.metric: check.limit for check in stage.checks}
    assert (
        limits["one_minus_cosine_mean"]
        == load_budgets().for_precision("palette4").metrics["one_minus_cosine_mean"].value
    )
    assert text["weights_found"] == text["weights"] > 3


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
