"""A generative student recorded on a GPU, held to float64 on the CPU, and a bundle held to the recording."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketvlm.export.vlm.bundle import export_vlm
from pocketvlm.export.vlm.parity import check_vlm_parity
from pocketvlm.export.vlm.reference import VlmReference, load_vlm_reference
from pocketvlm.export.vlm.reference_write import answered, record_cases, record_vlm_reference
from pocketvlm.students.vlm import load_vlm, save_vlm
from pocketvlm.teachers.device import full_float32

pytestmark = pytest.mark.cuda


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"cuda_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
toy, toys = _load(HERE / "toy_vlm.py"), _load(HERE.parent / "distill" / "vlm_toys.py")
SMALL: dict[str, Any] = {"prompts": 12, "questions": 40}


@pytest.fixture(scope="module", autouse=True)
def _made_up_pictures() -> Iterator[None]:
    """A machine with a GPU may lack the packages of the built-in ones."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pocketvlm.export.vlm.reference_write.picture_set", lambda *_, **__: toys.PICTURES)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(toy.toy_vlm(context_length=128), tmp_path_factory.mktemp("vlm") / "student")


@pytest.fixture(scope="module")
def recorded(saved: Path) -> VlmReference:
    return record_vlm_reference(saved, saved.parent / "reference", device="cuda", **SMALL)


def test_the_recording_says_what_the_machine_was(recorded: VlmReference, saved: Path) -> None:
    assert recorded.manifest is not None
    machine, numerics = recorded.manifest["environment"], recorded.manifest["numerics"]
    assert machine["device"] == "cuda"
    assert all(machine[key] for key in ("device_name", "cuda", "cudnn", "driver", "compute_capability"))
    assert (numerics["dtype"], numerics["attention"], numerics["deterministic_algorithms"]) == ("float32", "math", True)
    assert numerics["cublas_workspace_config"] in (":4096:8", ":16:8")
    assert not any(numerics[key] for key in ("tf32_matmul", "tf32_cudnn", "cudnn_benchmark", "autocast"))
    noise = json.loads((saved.parent / "reference" / "noise.json").read_text())
    assert noise["rerun"]["max_abs"] == 0
    assert 0 < noise["float32"]["max_abs"] < 1e-3


def test_it_answers_as_float64_on_the_cpu(recorded: VlmReference, saved: Path) -> None:
    there = record_vlm_reference(saved, saved.parent / "cpu", device="cpu", **SMALL)
    assert [case.text for case in recorded.cases] == [case.text for case in there.cases]
    assert [case.said for case in recorded.cases] == [case.said for case in there.cases]
    assert [question.right for question in recorded.task] == [question.right for question in there.task]
    for one, two in zip(recorded.cases, there.cases):
        np.testing.assert_array_equal(one.pixels, two.pixels)
        assert one.logits is not None
        assert two.logits is not None
        assert np.abs(one.logits - two.logits).max() <= 10 * there.noise
        np.testing.assert_allclose(one.log_sum, two.log_sum, atol=10 * there.noise)


def test_cases_are_answered_where_the_model_is(saved: Path) -> None:
    model = load_vlm(saved)
    asked = [(toy.picture(seed), prompt, 8) for seed, prompt in enumerate(("What is this?", "bus"))]
    here, _, _ = record_cases(model, asked)
    with full_float32():
        there, _, _ = record_cases(model.cuda(), asked)
        again = answered(model, asked)
    assert [case.said for case in here] == [case.said for case in there]
    for one, two in zip(here, there):
        assert one.logits is not None
        assert two.logits is not None
        # both are float64
        assert np.abs(one.logits - two.logits).max() < 1e-8
    assert [case.said for case in again] == [case.said for case in here]


def test_files_made_here_are_held_to_it(recorded: VlmReference, saved: Path) -> None:
    bundle = export_vlm(saved, saved.parent / "bundle", ["onnx"], ["fp32"])
    report = check_vlm_parity(bundle, reference=saved.parent / "reference", threads=1)
    assert report.status == "pass", report.variants[0].failures
    assert report.reference["device"] == "cuda"
    assert load_vlm_reference(saved.parent / "reference").digest == report.reference["sha256"] == recorded.digest
