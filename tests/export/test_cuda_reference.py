"""This machine's bundles of a committed student, held to a run that a GPU recorded (benchmarks/cuda_reference.py).

The run is no build product: without it these tests fail. It is made again only on purpose, on a machine with CUDA.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.parity import ParityReport, check_parity
from pocketvlm.export.reference import load_reference
from pocketvlm.export.reference_check import replay
from pocketvlm.students import load_student

FOLDER = Path(__file__).parent.parent / "fixtures" / "cuda_reference"
RUN = FOLDER / "run"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    assert (RUN / "manifest.json").is_file(), "the recording by a GPU is missing; see benchmarks/cuda_reference.py"
    bundle = export_bundle(
        FOLDER / "student",
        tmp_path_factory.mktemp("bundle") / "bundle",
        ("onnx:fp32", "onnx:int8"),
        calibration_data=f"{FOLDER / 'data' / 'pictures.jsonl'}",
    )
    return check_parity(bundle, RUN)


def test_a_gpu_recorded_this_student_in_strict_float32() -> None:
    run = load_reference(RUN)
    machine, numerics = run.manifest["environment"], run.manifest["numerics"]
    assert machine["device"] == "cuda"
    assert all(machine[key] for key in ("device_name", "cuda", "cudnn", "driver", "torch"))
    assert numerics["dtype"] == "float32"
    assert (numerics["attention"], numerics["deterministic_algorithms"]) == ("math", True)
    assert numerics["cublas_workspace_config"] in (":4096:8", ":16:8")
    assert not any(numerics[key] for key in ("tf32_matmul", "tf32_cudnn", "cudnn_benchmark", "autocast"))
    assert run.noise["tf32"]["made"] == "hardware"
    assert run.contract == load_student(FOLDER / "student").contract
    assert run.manifest["counts"]["task_pictures"] == 64
    # what is committed names no folder of the machine and stays small
    assert "/" not in run.manifest["command"].replace("data/pictures.jsonl", "")
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 4_000_000


def test_full_precision_is_within_budget_of_the_gpu(report: ParityReport) -> None:
    variant = report.variant("onnx", "fp32")
    assert variant.status == "pass", variant.message
    assert [stage.stage for stage in variant.stages] == ["S0", "S1", "S2", "S4", "S5"]
    for tower in ("image", "text"):
        assert variant.stage("S2").details[tower]["one_minus_cosine_max"] <= 1e-6


def test_int8_has_lost_nothing_beyond_its_budget(report: ParityReport) -> None:
    """64 questions may be too few to prove the bound on lost accuracy: "undecided" is then the honest answer."""
    variant = report.variant("onnx", "int8")
    assert variant.status in ("pass", "undecided"), variant.message
    assert variant.stage("S3").status == "pass"
    assert json.dumps(variant.to_dict())


def test_the_recording_of_a_gpu_is_replayed_here() -> None:
    found = replay(load_reference(RUN), FOLDER / "student", device="cpu")
    assert found.same, found.lines()
