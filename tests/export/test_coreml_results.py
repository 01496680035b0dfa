"""The script that a bundle carries for a Mac, with Core ML itself replaced, and its results judged by parity."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.mil import MilBackend
from pocketvlm.export.parity import check_parity
from pocketvlm.export.parity_predictions import read_predictions, stage_predictions
from pocketvlm.export.reference import record_reference

_spec = importlib.util.spec_from_file_location("toy_parity", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        # as with a large input: only the first few pictures come with their pixels
        patched.setattr("pocketvlm.export.conformance._PIXELS_BYTES", 0)
        return export_bundle(toy.toy_student(), tmp_path_factory.mktemp("mac") / "bundle", ("coreml:fp16",))


def _script(bundle: Path) -> Any:
    """The bundle's own copy, as a Mac would run it."""
    spec = importlib.util.spec_from_file_location("copied_predict", bundle / "conformance/coreml_predict.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _as_core_ml(change: Any = lambda row: row) -> Any:
    """Stands where `open_package` does: this machine's evaluator, its answer changed."""

    def open_model(path: Path, units: str) -> Any:
        tower = path.name.split("-")[0]
        backend = MilBackend({tower: path})
        run = backend.run_image if tower == "image" else backend.run_text
        return lambda row: change(run(row[None]))

    return open_model


@pytest.fixture(scope="module")
def results(bundle: Path) -> dict[str, Any]:
    return json.loads(json.dumps(_script(bundle).run(bundle, "ALL", _as_core_ml()), allow_nan=False))


def _judge(bundle: Path, results: dict[str, Any], folder: Path) -> Any:
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    opened = Bundle.load(bundle)
    return stage_predictions(opened, opened.variants[0], read_predictions(path))


def test_the_script_needs_nothing_but_numpy_coremltools_and_pillow(bundle: Path) -> None:
    tree = ast.parse((bundle / "conformance/coreml_predict.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"numpy", "coremltools", "PIL"}


@pytest.mark.skipif(sys.platform == "darwin", reason="there it runs")
def test_the_script_says_that_it_needs_a_mac(bundle: Path) -> None:
    script = bundle / "conformance/coreml_predict.py"
    # isolated: neither this project nor the folder it is run from can be imported
    done = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert "Core ML predicts on macOS only" in done.stderr


def test_results_are_read_back_and_pass(bundle: Path, results: dict[str, Any], tmp_path: Path) -> None:
    vectors = Bundle.load(bundle).conformance()
    rows = results["variants"][0]["towers"]
    with_pixels = [case["name"] for case in vectors["images"] if "pixels_file" in case]
    assert [row["name"] for row in rows["image"]] == with_pixels
    assert len(with_pixels) == 4 < len(vectors["images"])
    assert [row["name"] for row in rows["text"]] == [case["name"] for case in vectors["texts"]]
    stage = _judge(bundle, results, tmp_path)
    assert stage.status == "pass", stage.message
    assert stage.details["image, against coreml-mil"]["sqnr_db"] > 120
    assert "compute units ALL" in stage.message


def test_parity_shows_what_the_mac_answered(bundle: Path, results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    reference = record_reference(toy.toy_student(), tmp_path / "reference", data=toy.toy_data(), device="cpu").folder
    report = check_parity(bundle, reference, coreml_results=path, out=tmp_path / "out")
    assert report.variants[0].stage("predict").status == "pass"
    assert "predictions of a Mac" in (tmp_path / "out/parity.html").read_text()
    changed = json.loads(path.read_text())
    changed["variants"][0]["towers"]["text"][0]["embedding"][0] += 0.5
    path.write_text(json.dumps(changed))
    report = check_parity(bundle, reference, coreml_results=path)
    assert (report.status, report.failed_stage) == ("fail", "predict")


def test_other_answers_fail(bundle: Path, tmp_path: Path) -> None:
    stage = _judge(bundle, _script(bundle).run(bundle, "ALL", _as_core_ml(lambda row: row[:, ::-1])), tmp_path)
    assert stage.status == "fail"
    assert "1 - cosine (worst)" in stage.message


def test_an_answer_that_is_no_number_fails(bundle: Path, tmp_path: Path) -> None:
    found = _script(bundle).run(bundle, "ALL", _as_core_ml(lambda row: np.where(row > 0.1, np.nan, row)))
    stage = _judge(bundle, json.loads(json.dumps(found, allow_nan=False)), tmp_path)
    assert stage.status == "fail"
    assert "non-finite values" in stage.message


def test_a_package_that_core_ml_refuses_fails(bundle: Path, tmp_path: Path) -> None:
    def refuses(path: Path, units: str) -> Any:
        raise RuntimeError("no such layer")

    with pytest.raises(IntegrityError, match=r"image tower failed on the Mac \(RuntimeError: no such layer\)"):
        _judge(bundle, _script(bundle).run(bundle, "ALL", refuses), tmp_path)


WRONG = {
    "another model": (lambda r: r.update(model_id="other-1"), "are of model 'other-1' and the bundle holds"),
    "other vectors": (lambda r: r.update(vectors_sha256="0" * 64), "other conformance vectors"),
    "no such variant": (lambda r: r.update(variants=[]), "have no fp16 variant"),
    "other bytes": (
        lambda r: r["variants"][0]["files"].update({next(iter(r["variants"][0]["files"])): "0" * 64}),
        "the image package that the Mac ran has other bytes",
    ),
    "a case left out": (lambda r: r["variants"][0]["towers"]["text"].pop(), "lack 1 of"),
    "another width": (
        lambda r: [row["embedding"].pop() for row in r["variants"][0]["towers"]["image"]],
        r"image embeddings of shape \[31\], expected \[32\]",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_results_of_something_else_are_refused(
    bundle: Path, results: dict[str, Any], tmp_path: Path, fault: str
) -> None:
    change, message = WRONG[fault]
    changed = json.loads(json.dumps(results))
    change(changed)
    with pytest.raises(IntegrityError, match=message):
        _judge(bundle, changed, tmp_path)


def test_what_is_no_results_file_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(UsageError, match="cannot be read as the results of a Mac"):
        read_predictions(path)
    path.write_text('{"kind": "parity"}')
    with pytest.raises(UsageError, match="is not of kind 'coreml-results'"):
        read_predictions(path)
    path.write_text(json.dumps(results | {"schema": "9.0"}))
    with pytest.raises(VersionError):
        read_predictions(path)
