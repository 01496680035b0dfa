"""A reference recorded on a GPU: what its manifest promises, its noise floor, and bundles held to it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.numerics import strict_numerics, tf32
from pocketvlm.export.parity import check_parity
from pocketvlm.export.reference import load_reference, record_reference
from pocketvlm.teachers import load_teacher

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"cuda_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


toy = _load("toy_parity")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a student that lies on the GPU, as one does after training."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    student = toy.toy_student().to(CUDA)
    record_reference(student, folder, data=toy.toy_data(), device="cuda")
    assert next(student.parameters()).is_cuda
    return folder


def test_the_manifest_says_what_the_machine_was_and_did(recorded: Path) -> None:
    manifest = load_reference(recorded).manifest
    machine, numerics = manifest["environment"], manifest["numerics"]
    assert machine["device"] == "cuda"
    assert machine["device_name"] == torch.cuda.get_device_name()
    assert machine["cuda"] == torch.version.cuda
    assert machine["cudnn"] == torch.backends.cudnn.version()
    assert machine["driver"]
    assert machine["compute_capability"] == list(torch.cuda.get_device_capability())
    assert numerics["dtype"] == "float32"
    assert numerics["attention"] == "math"
    assert numerics["cublas_workspace_config"] in (":4096:8", ":16:8")
    assert numerics["deterministic_algorithms"] is True
    assert not any(numerics[key] for key in ("tf32_matmul", "tf32_cudnn", "cudnn_benchmark", "autocast"))


def test_the_noise_floor_is_measured_with_real_tf32(recorded: Path) -> None:
    noise = load_reference(recorded).noise
    assert set(noise) == {"rerun", "float32", "batch", "tf32", "bfloat16", "float16"}
    worst = {key: max(entry[t]["one_minus_cosine_max"] for t in ("image", "text")) for key, entry in noise.items()}
    assert worst["rerun"] == 0
    assert 0 < worst["float32"] < 1e-9
    assert worst["batch"] < 1e-9
    assert noise["tf32"]["made"] == ("hardware" if torch.cuda.get_device_capability() >= (8, 0) else "emulated")
    # no lower bound: cuDNN and cuBLAS may find TF32 not worth it for layers this small
    assert worst["tf32"] < worst["bfloat16"] < 1e-2


def test_two_recordings_agree_to_rounding(recorded: Path, tmp_path: Path) -> None:
    """Not to the bit, as a rerun inside one recording does: an H100 sums in an order that depends on where tensors
    lie."""
    first = load_reference(recorded)
    again = record_reference(toy.toy_student(), tmp_path / "again", data=toy.toy_data(), device="cuda")
    assert again.weights == first.weights
    for key in first.arrays:
        if first.arrays[key].dtype.kind == "f":
            np.testing.assert_allclose(again.arrays[key], first.arrays[key], rtol=0, atol=1e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(again.arrays[key], first.arrays[key], err_msg=key)


def test_it_agrees_with_the_cpus_float64_recording(recorded: Path, tmp_path: Path) -> None:
    record_reference(toy.toy_student(), tmp_path / "cpu", data=toy.toy_data(), device="cpu")
    ours, theirs = load_reference(recorded), load_reference(tmp_path / "cpu")
    for key in ("pixels", "ids"):
        np.testing.assert_array_equal(ours.arrays[key], theirs.arrays[key])
    for key in ("image", "text"):
        np.testing.assert_allclose(ours.arrays[key], theirs.arrays[key], rtol=0, atol=1e-5)
        assert ours.taps[key][0] == theirs.taps[key][0]
    assert ours.weights == theirs.weights


def test_bundles_are_held_to_it(recorded: Path, tmp_path: Path) -> None:
    """Exported from the student where it lies, on the GPU."""
    student = toy.toy_student().to(CUDA)
    report = check_parity(export_bundle(student, tmp_path / "good", ("onnx:fp32",)), recorded)
    assert (report.status, report.exit_code) == ("pass", 0), report.message
    with torch.no_grad():
        student.image_tower.projection.first.weight[0] *= 1.01
    report = check_parity(export_bundle(student, tmp_path / "other", ("onnx:fp32",)), recorded)
    assert report.status == "fail"


@pytest.mark.parametrize("kind", ["hf_clip", "open_clip"])
def test_somebody_elses_model_is_recorded_and_passes(kind: str, tmp_path: Path) -> None:
    upstreams = _load("test_foreign")
    (tmp_path / "model").mkdir()
    save = upstreams.save_open_clip if kind == "open_clip" else upstreams.save_hf
    spec = save(tmp_path / "model", kind).spec
    run = record_reference(load_teacher(spec, device="cuda"), tmp_path / "run", data=toy.toy_data(), device="cuda")
    assert run.manifest["environment"]["device"] == "cuda"
    report = check_parity(export_bundle(spec, tmp_path / "bundle", ("onnx:fp32",)), tmp_path / "run")
    assert (report.status, report.exit_code) == ("pass", 0), report.message


def test_flags_reach_the_hardware_and_are_put_back() -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    a, b = (torch.randn(256, 256, device=CUDA, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    made, inside = tf32(CUDA)
    with strict_numerics(CUDA):
        strict = float((a @ b - exact).abs().max())
        with inside():
            rounded = float((a @ b - exact).abs().max())
        assert float((a @ b - exact).abs().max()) == strict
    # 256 products of size one: float32 errs by 1e-5, a factor of 10 mantissa bits by 1e-2
    assert strict < 1e-3 < rounded
    assert made in ("hardware", "emulated")
    assert not torch.are_deterministic_algorithms_enabled()
