"""Proof that the gate works: faults are planted one at a time, and parity names each at the stage where it belongs.

The table "Planted faults" of docs/parity.md is held to `FAULTS`: the same faults, stages and words.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.export.parity import check_parity
from pocketvlm.export.parity_bisect import bisect_precision
from pocketvlm.export.parity_report import render_html
from pocketvlm.export.reference import record_reference

ROOT = Path(__file__).parents[2]


def _load(name: str) -> ModuleType:
    full = f"planted_faults_{name}"
    spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module  # dataclasses look their module up while they are made
    spec.loader.exec_module(module)
    return module


world: Any = _load("world")
planted: Any = _load("planted")

# what is planted, the stage that must be the first to fail, what the report's sentence says
FAULTS: list[tuple[str, Callable[[Any], None], str, str]] = [
    ("a swapped artifact", planted.artifact_swapped_after_export, "bundle", "it was changed or damaged after export"),
    ("no case in the reference", planted.empty_case_set, "reference", "has no image case to compare"),
    (
        "logit scale stored without exp",
        planted.logit_scale_without_exp,
        "identity",
        "logit_scale of the bundle is 2.6",
    ),
    ("resize without antialias", planted.resize_without_antialias, "S0", "pictures are not as recorded"),
    ("BGR for RGB", planted.channels_as_bgr, "S0", "pictures are not as recorded"),
    ("EXIF rotation ignored", planted.exif_rotation_ignored, "S0", "first: exif-6 differs"),
    ("padding with 0", planted.padding_is_0, "S1", "pad_id is 0, recorded was 3"),
    ("text not truncated", planted.text_is_not_truncated, "S1", "texts are not as recorded"),
    ("closing token cut off", planted.closing_token_is_cut, "S1", "texts are not as recorded"),
    ("mean and std of another family", planted.mean_and_std_of_another_family, "S2", "image: 1 - cosine (worst)"),
    ("end token from the last position", planted.eot_from_the_last_position, "S2", "text: 1 - cosine (worst)"),
    ("attention mask forgotten", planted.mask_forgotten, "S2", "text: 1 - cosine (worst)"),
    ("GELU by tanh for erf", planted.gelu_by_tanh, "S2", "text: SQNR is 7"),
    ("LayerNorm epsilon", planted.layer_norm_epsilon, "S2", "text: 1 - cosine (worst)"),
    (
        "a weight of one checkpoint earlier",
        planted.stale_weight,
        "S2",
        "departs is in the text tower at blocks.0",
    ),
    ("output not normalised", planted.not_normalised, "S2", "text: SQNR is"),
    ("NaN in one of 500 cases", planted.nan_in_one_of_500, "S2", "in 1 of 508 cases, first 'many/"),
    (
        "float16 overflow before a LayerNorm",
        planted.absorbed_overflow,
        "S3",
        "blocks.1: fp16 headroom",
    ),
    ("one scale per tensor", planted.scale_per_tensor, "S3", "weights with one scale for the whole tensor is 9"),
    ("int8 that is float", planted.left_in_float, "S3", "has no integer weight: the converter left it in float"),
    ("calibration on noise", planted.calibrated_on_noise, "S3", "image: 1 - cosine (mean)"),
    ("int8 scales in another order", planted.int8_rows_out_of_order, "S3", "error of its own has blocks.0"),
    ("answers of a batch mixed up", planted.runtime_that_mixes_up_a_batch, "S4", "image: 1 - cosine (worst)"),
    ("logits without exp in the application", planted.logits_without_exp, "S4", "(end to end): classify:"),
]


@pytest.fixture(scope="module")
def student() -> Any:
    return world.student()


@pytest.fixture(scope="module")
def recorded(student: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faults")
    loud = world.loud(student)
    record_reference(student, folder / "reference", data=world.toy.toy_data(), device="cpu")
    record_reference(student, folder / "500", data=world.many(), device="cpu")
    record_reference(loud, folder / "loud", data=world.toy.toy_data(), device="cpu")
    world.make_bundle(student, folder / "bundle")
    world.toy.make_bundle(loud, folder / "loud-bundle")
    return {path.name: path for path in folder.iterdir()}


def _scene(student: Any, recorded: dict[str, Path], scratch: Path, patch: pytest.MonkeyPatch) -> Any:
    bundle = Path(shutil.copytree(recorded["bundle"], scratch / "bundle"))
    return planted.Scene(world, student, bundle, recorded["reference"], patch, scratch, recorded)


@pytest.mark.parametrize(("plant", "stage", "says"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_planted_fault_is_named_at_its_stage(
    plant: Callable[[Any], None],
    stage: str,
    says: str,
    student: Any,
    recorded: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = _scene(student, recorded, tmp_path, monkeypatch)
    plant(scene)
    report = check_parity(scene.bundle, scene.reference)
    assert (report.status, report.exit_code, report.failed_stage) == ("fail", 1, stage), report.message
    assert says in report.message


def test_twenty_clean_reruns_raise_no_alarm(student: Any, recorded: dict[str, Path]) -> None:
    """Twenty times the same files, with torch's thread count changing, as it does between machines."""
    threads = torch.get_num_threads()
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 3)
            report = check_parity(recorded["bundle"], recorded["reference"])
            assert report.exit_code == 0, report.message
            assert report.variant("onnx", "fp32").status == "pass"
            # 40 queries decide no int8 task; everything before it passes
            assert report.variant("onnx", "int8").stage("S3").status == "pass"
    finally:
        torch.set_num_threads(threads)


def test_the_block_with_the_fault_has_an_error_of_its_own_and_the_next_inherits_it(
    student: Any, recorded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = _scene(student, recorded, tmp_path, monkeypatch)
    planted.int8_rows_out_of_order(scene)
    report = check_parity(scene.bundle, scene.reference, targets=["onnx:int8"])
    text = {tap.tap: tap for tap in report.variants[0].depth["text"]}
    first, second = text["blocks.0"], text["blocks.1"]
    assert first.own == first.total
    assert first.own > 10 * second.own
    assert second.total > 10 * second.own
    clean = check_parity(recorded["bundle"], recorded["reference"], targets=["onnx:int8"]).variants[0]
    assert first.own > 10 * next(tap.own for tap in clean.depth["text"] if tap.tap == "blocks.0")
    page = render_html(report)
    assert "Drift over depth" in page
    assert page.count("<svg") == 2


def test_bisect_finds_the_one_block_that_must_stay_in_float(
    student: Any, recorded: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = _scene(student, recorded, tmp_path, monkeypatch)
    reference = recorded["reference"]
    assert bisect_precision(scene.bundle, reference, "onnx:int8").keep == []
    planted.int8_rows_out_of_order(scene)
    found = bisect_precision(scene.bundle, reference, "onnx:int8")
    assert found.keep == ["text blocks.0"], found.message
    assert next(iter(found.blocks)) == "text blocks.0"
    # what no block in float can mend
    planted.scale_per_tensor(scene)
    found = bisect_precision(scene.bundle, reference, "onnx:int8")
    assert found.keep is None
    assert "even with every block in float" in found.message


def test_bisect_refuses_what_it_cannot_cut(recorded: dict[str, Path], tmp_path: Path) -> None:
    reference = recorded["reference"]
    with pytest.raises(UsageError, match="nothing to keep"):
        bisect_precision(recorded["bundle"], reference, "onnx:fp32")
    with pytest.raises(UnknownNameError, match="onnx:int8"):
        bisect_precision(recorded["bundle"], reference, "onnx:int4")
    alone = Path(shutil.copytree(recorded["bundle"], tmp_path / "alone"))
    world.toy.sign(alone, variants=[world.toy.variant(precision="int8")])
    with pytest.raises(UsageError, match="no onnx fp32 variant beside"):
        bisect_precision(alone, reference, "onnx:int8")


def test_full_precision_taps_are_as_recorded_or_folded(recorded: dict[str, Path]) -> None:
    report = check_parity(recorded["bundle"], recorded["reference"], targets=["onnx:fp32"])
    depth = report.variants[0].depth
    assert not any(tap.outlier for taps in depth.values() for tap in taps)
    folded = [tap.tap for tap in depth["image"] if tap.deviation > 1e-4]
    # the batch norm after a convolution became a part of it
    assert folded == ["trunk.conv_stem", "trunk.conv_head"]
    assert not [tap for tap in depth["text"] if tap.deviation > 1e-4]


def test_the_table_in_the_docs_is_what_is_tested() -> None:
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    section = text.split("## Planted faults")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    found = [(fault, stage, re.sub(r"^`|`$", "", says)) for fault, stage, says in rows[1:]]
    assert found == [(name, stage, says) for name, _, stage, says in FAULTS]
    assert len(FAULTS) >= 17
