"""A label set in the graph: the same logits as both towers give, on every target, and no text tower on the device."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm.cli import main
from pocketvlm.edge.bundle import Bundle, describe_files
from pocketvlm.edge.conformance import check_conformance
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.preprocess import load_image, stack
from pocketvlm.export.bundle import export_bundle, format_table, summarize
from pocketvlm.export.labels import bake_labels, read_labels
from pocketvlm.export.mil import MilBackend
from pocketvlm.export.parity import check_parity
from pocketvlm.export.source import open_source
from pocketvlm.students import save_student

_spec = importlib.util.spec_from_file_location("toy_parity_for_labels", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

LABELS = ("red circle", "blue square", "a green bar", "pink ring")
TEMPLATES = ("{}", "picture of the {}")


@pytest.fixture(scope="module")
def dual(student: Any) -> Any:
    # a scale that a forgotten exponential would miss by far
    with torch.no_grad():
        student.log_scale.fill_(math.log(60.0))
    return student


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [sample.image.read() for sample in toy.toy_data().samples]


@pytest.fixture(scope="module")
def both(dual: Any, tmp_path_factory: pytest.TempPathFactory) -> EdgeModel:
    folder = tmp_path_factory.mktemp("both") / "bundle"
    return EdgeModel.load(export_bundle(dual, folder, ["onnx:fp32"]))


@pytest.fixture(scope="module")
def bundle(dual: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "bundle"
    targets = ["onnx:fp32", "onnx:int8", "executorch:fp32", "coreml:fp32"]
    return export_bundle(dual, folder, targets, calibration_data=toy.toy_data(), labels=LABELS, templates=TEMPLATES)


def logits_of(both: EdgeModel, pictures: list[bytes]) -> np.ndarray:
    """By hand, in float64: the way that `EdgeModel.classify` documents."""
    columns = []
    for label in LABELS:
        rows = [both.embed_text(t.replace("{}", label))[0].astype(np.float64) for t in TEMPLATES]
        mean = sum(row / np.linalg.norm(row) for row in rows) / len(rows)
        columns.append(mean / np.linalg.norm(mean))
    return 60.0 * both.embed_image(pictures).astype(np.float64) @ np.array(columns).T


def test_logits_are_those_of_both_towers(bundle: Path, both: EdgeModel, pictures: list[bytes]) -> None:
    wanted = logits_of(both, pictures)
    assert np.ptp(wanted) > 1, "the towers tell the labels apart"
    asked = both.classify(pictures, LABELS, TEMPLATES)
    for backend in ("onnxruntime", "executorch"):
        model = EdgeModel.load(bundle, backend=backend)  # type: ignore[arg-type]
        # float32 of numbers up to 60: 1e-5 of their size
        np.testing.assert_allclose(model.embed_image(pictures), wanted, atol=60e-5, rtol=0)
        for found, expected in zip(model.classify(pictures), asked):
            assert found.label == expected.label
            assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    packaged = MilBackend({"image": bundle / "coreml/image-fp32.mlpackage"})
    spec = Bundle.load(bundle).contract.image
    assert spec is not None
    rows = stack([load_image(picture, spec) for picture in pictures])
    np.testing.assert_allclose(packaged.run_image(rows), wanted, atol=60e-5, rtol=0)


def test_the_bundle_is_a_classifier_without_text(bundle: Path, dual: Any) -> None:
    opened = Bundle.load(bundle)
    contract = opened.contract
    assert (contract.kind, contract.labels, contract.text) == ("classifier", LABELS, None)
    assert (contract.embed_dim, contract.dims, contract.logit_scale) == (4, (4,), 1.0)
    assert contract.model_id != dual.contract.model_id
    assert all(set(variant.files) == {"image"} for variant in opened.variants)
    assert not list(bundle.rglob("tokenizer.json"))
    facts = opened.provenance["labels_of"]
    assert (facts["model_id"], facts["templates"]) == (dual.contract.model_id, list(TEMPLATES))
    assert facts["logit_scale"] == pytest.approx(60.0, rel=1e-6), "not its logarithm"
    for stage in check_conformance(opened, "onnxruntime", "fp32") + check_conformance(opened, "onnxruntime", "int8"):
        assert stage.passed, stage
    kept = opened.variant("onnx", "int8").notes["same_label"]
    assert kept["pictures"] == 10, "a quarter of the calibration pictures, which set no range"
    assert kept["share"] >= 0.8
    assert opened.variant("onnx", "fp32").notes["same_label"]["share"] == 1.0
    assert "100.0 %" in format_table(summarize(bundle))
    with pytest.raises(UsageError, match="has no text tower"):
        EdgeModel.load(opened).embed_text("red")


def test_other_labels_or_prompts_are_another_model(dual: Any) -> None:
    source = open_source(dual)
    ids = [
        bake_labels(source, labels, templates).towers.contract.model_id
        for labels, templates in ((LABELS, "{}"), (LABELS, TEMPLATES), (LABELS[::-1], "{}"), (LABELS, ("{}",)))
    ]
    assert len(set(ids)) == 3
    assert ids[0] == ids[3], "one template alone or in a list"


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((bundle / "bundle.json").read_text())
    change(raw)
    (bundle / "bundle.json").write_text(json.dumps(raw))


def test_tampering_is_caught(bundle: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / name))

    # two labels exchanged: every answer would be another one
    swapped = copy("swapped")
    edit(swapped, lambda raw: raw["contract"].update(labels=[LABELS[1], LABELS[0], *LABELS[2:]]))
    with pytest.raises(IntegrityError, match="not the one that it was exported with"):
        EdgeModel.load(swapped)
    short = copy("short")
    edit(short, lambda raw: raw["contract"].update(labels=LABELS[:3]))
    with pytest.raises(UsageError, match="3 labels for 4 logits"):
        EdgeModel.load(short)
    file = copy("file")
    path = file / "onnx/image-fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="image-fp32"):
        EdgeModel.load(file)


def test_a_logit_scale_without_its_exponential_fails_conformance(
    bundle: Path, dual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The direction of the logits is right then, and a cosine alone would pass it."""
    source = open_source(dual)
    contract = dataclasses.replace(source.towers.contract, logit_scale=math.log(60.0))
    wrong = dataclasses.replace(source, towers=dataclasses.replace(source.towers, contract=contract))
    folder = export_bundle(wrong, tmp_path / "wrong", ["onnx:fp32"], labels=LABELS, templates=TEMPLATES)
    vectors = folder / "conformance/vectors.json"
    vectors.write_bytes((bundle / "conformance/vectors.json").read_bytes())
    edit(folder, lambda raw: raw.update(files=describe_files(folder)))
    stages = {stage.stage: stage for stage in check_conformance(folder, "onnxruntime", "fp32")}
    assert stages["S0 pixels"].passed
    assert not stages["S3 image graph"].passed
    assert not stages["S4 image"].passed


@pytest.mark.parametrize(
    ("labels", "templates", "says"),
    [
        ((), "{}", "0 labels were given"),
        (("cat",), "{}", "1 labels were given"),
        (("cat", "dog", "cat"), "{}", "more than once"),
        (("cat", " "), "{}", "is no text"),
        ("cat", "{}", "one string"),
        (("cat", "dog"), "a picture", "where the label goes"),
        (("cat", "dog"), (), "where the label goes"),
    ],
)
def test_what_is_refused(dual: Any, labels: Any, templates: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        bake_labels(open_source(dual), labels, templates)


def test_a_classifier_takes_no_labels_and_is_not_its_dual_encoder(dual: Any, bundle: Path, reference: Path) -> None:
    with pytest.raises(UsageError, match="is of kind 'classifier'"):
        bake_labels(bake_labels(open_source(dual), LABELS), LABELS)
    report = check_parity(bundle, reference)
    assert (report.status, report.failed_stage) == ("fail", "identity")
    assert "different models" in report.message


def test_labels_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffcat\r\n\r\n  a brown dog \nnaïve café\n".encode())
    assert read_labels(path) == ("cat", "a brown dog", "naïve café")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_labels(path)
    with pytest.raises(UsageError, match="No such file"):
        read_labels(tmp_path / "none.txt")


def test_on_the_command_line(
    dual: Any, tmp_path: Path, pictures: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save_student(dual, tmp_path / "saved")
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    (tmp_path / "one.png").write_bytes(pictures[0])
    main(["export", str(saved), "--targets", "onnx:fp32", "--labels", str(tmp_path / "labels.txt"),
          "--out", str(tmp_path / "bundle")])  # fmt: skip
    capsys.readouterr()
    main(["classify", str(tmp_path / "bundle"), str(tmp_path / "one.png"), "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["label"] in LABELS
    with pytest.raises(SystemExit):
        main(["export", str(saved), "--templates", "a {}", "--out", str(tmp_path / "other")])
    assert "without --labels" in capsys.readouterr().err
