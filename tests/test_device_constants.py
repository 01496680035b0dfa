"""The constants of devices and the check of plans by them: small, and on the CPU where no GPU is marked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import device_constants, plan_check
from benchmarks.device_constants import both_ways, build, rates, short_name
from benchmarks.made_up_run import STUDENT
from pocketvlm.distill.counting import Seconds, count
from pocketvlm.distill.devices import load_devices

CPU = torch.device("cpu")
SMALL = {"image.size": 32, "text.layers": 1, "text.width": 32, "text.heads": 2, "text.context_length": 12}
CONSTANTS = {"convolution_flops", "matrix_flops", "decode_per_core"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, rounds, pictures and steps, and a minute student."""
    monkeypatch.setattr(device_constants, "SETTINGS", {"cpu": (4, 1, 0.0), "cuda": (4, 1, 0.0)})
    monkeypatch.setattr(plan_check, "SETTINGS", device_constants.SETTINGS)
    monkeypatch.setattr(device_constants, "OTHER_BATCHES", (2,))
    for module in (device_constants, plan_check):
        monkeypatch.setattr(module, "OVERRIDES", SMALL)
    monkeypatch.setattr(device_constants, "LARGER", STUDENT)
    monkeypatch.setattr(device_constants, "LARGER_TEXT", SMALL | {"text.layers": 2})
    monkeypatch.setattr(plan_check, "PICTURES", 24)
    monkeypatch.setattr(plan_check, "STEPS", 4)
    monkeypatch.setattr(plan_check, "FIRST", 1)
    monkeypatch.setattr(plan_check, "CASES", ((STUDENT, SMALL, 12), (STUDENT, SMALL, 4)))


def test_a_rate_is_the_counted_work_over_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations for each multiply-accumulate of all rows, counted on a part of them; a core by its own time."""
    student = build(STUDENT, SMALL)
    rows = {
        "convolution_flops": torch.zeros(6, 32, 32, 3, dtype=torch.uint8),
        "matrix_flops": torch.ones(6, 12, dtype=torch.int32),
    }
    whole = {name: count(both_ways(student, value, CPU)).macs for name, value in rows.items()}
    monkeypatch.setattr(device_constants, "COUNTED", 3)
    monkeypatch.setattr(device_constants, "median", lambda *_: Seconds(cpu_s=0.5, wall_s=8.0))
    assert rates(student, CPU, 6, 1, 0.0) == pytest.approx({name: 4 * macs for name, macs in whole.items()})
    assert whole["convolution_flops"] != whole["matrix_flops"]


def test_forward_and_backward_leave_no_sum_of_gradients() -> None:
    student = build(STUDENT, SMALL)
    job = both_ways(student, torch.ones(3, 12, dtype=torch.int32), CPU)
    found = []
    for _ in range(2):
        job()
        found.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert found[0]
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "nvidia_l40s"),
    ],
)
def test_a_gpu_is_called_as_in_the_table(title: str, name: str) -> None:
    assert short_name(title) == name


def test_a_core_and_then_a_plan_by_its_constants(small: None, tmp_path: Path) -> None:
    device_constants.main(device="cpu", out=tmp_path)
    found = json.loads((tmp_path / "device_constants.json").read_text())
    assert set(found["constants"]) == CONSTANTS
    assert all(value > 0 for value in found["constants"].values())
    assert (found["command"], found["batch"], found["precision"]) == (
        "python -m benchmarks.device_constants", 4, "float32",
    )  # fmt: skip
    plan_check.main(device="cpu", out=tmp_path)
    checked = json.loads((tmp_path / "plan_check_cpu.json").read_text())
    for key in CONSTANTS:
        assert checked["constants"][key] == found["constants"][key]
    assert [case["batch"] for case in checked["cases"]] == [12, 4]
    for case in checked["cases"]:
        taken, said = case["measured"], case["planned"]
        assert set(said) == {"by constants", "here"}
        assert taken["peak_bytes"] is None
        assert taken["samples_per_s"] == pytest.approx(case["batch"] / taken["step_s"])
        assert taken["whole_s"] > taken["step_s"] > taken["wait_s"]
        for name, ratios in case["planned_over_measured"].items():
            assert "peak_bytes" not in ratios
            assert ratios["step_s"] == pytest.approx(said[name]["step_s"] / taken["step_s"], abs=1e-3)
    # the same constants over twice the rows: a core has no floor
    first, second = (case["planned"]["by constants"]["step_s"] for case in checked["cases"])
    assert first > 2 * second


def test_no_case_is_begun_after_the_limit(small: None, tmp_path: Path) -> None:
    constants = {"matrix_flops": 1e10, "convolution_flops": 1e10, "decode_per_core": 900.0}
    (tmp_path / "device_constants.json").write_text(json.dumps({"command": "made up", "constants": constants}))
    plan_check.main(device="cpu", out=tmp_path, limit_s=0)
    assert not (tmp_path / "plan_check_cpu.json").exists()


def test_a_measured_gpu_replaces_what_the_table_assumes() -> None:
    result = {
        "command": "how", "constants": {"matrix_flops": 1.0, "step_floor_s": 0.5},
        "gpu": {"memory_bytes": 85e9, "cores_beside": 16},
    }  # fmt: skip
    table = load_devices()["h100"]
    found = plan_check.measured_device("h100", result)
    assert (found.matrix_flops, found.step_floor_s, found.memory_gb, found.cores) == (1.0, 0.5, 85.0, 16)
    assert found.sources["matrix_flops"] == ("measured", "how")
    assert (found.convolution_flops, found.sources["convolution_flops"]) == (
        table.convolution_flops, table.sources["convolution_flops"],
    )  # fmt: skip
    assert plan_check.measured_device("unknown", result).name == "unknown"


def test_the_branch_of_a_gpu(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the CPU, in its bfloat16."""
    facts = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85e9, "cores_beside": 16}
    monkeypatch.setattr(device_constants, "pick_device", lambda name: CPU)
    monkeypatch.setattr(device_constants, "gpu_facts", lambda: facts)
    monkeypatch.setattr(device_constants.optim, "autocast_dtype", lambda *_: torch.bfloat16)
    before = torch.backends.cudnn.benchmark
    device_constants.main(device="cuda", out=tmp_path)
    assert torch.backends.cudnn.benchmark is before
    (path,) = tmp_path.iterdir()
    assert path.name == "device_constants_h100.json"
    found = json.loads(path.read_text())
    assert found["command"] == "python -m benchmarks.device_constants --device cuda"
    assert found["precision"] == "bfloat16"
    assert found["gpu"] == facts
    assert set(found["constants"]) == {*CONSTANTS, "step_floor_s"}
    assert 0 < found["constants"]["step_floor_s"] < 60
    assert len(found["beside"]) == 5
    assert all(set(row) == {"convolution_flops", "matrix_flops"} for row in found["beside"].values())
    assert plan_check.measured_device("h100", found).step_floor_s == found["constants"]["step_floor_s"]


@pytest.mark.cuda
def test_a_gpu_and_then_a_plan_by_its_constants(small: None, tmp_path: Path) -> None:
    device_constants.main(device="cuda", out=tmp_path)
    name = short_name(torch.cuda.get_device_name())
    found = json.loads((tmp_path / f"device_constants_{name}.json").read_text())
    assert set(found["constants"]) == {*CONSTANTS, "step_floor_s"}
    assert found["gpu"]["name"] == torch.cuda.get_device_name()
    assert len(found["beside"]) == 5
    plan_check.main(device="cuda", out=tmp_path)
    for case in json.loads((tmp_path / f"plan_check_{name}.json").read_text())["cases"]:
        assert case["measured"]["peak_bytes"] > 0
        assert case["planned_over_measured"]["by constants"]["peak_bytes"] > 0
