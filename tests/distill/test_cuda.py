"""A GPU trains as the CPU does: the loop, its resume, its precisions, the objectives and the closed-form starts."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import toy_recipe
from objective_toys import build, outputs, total
from test_objectives_relation import EVERYTHING, label
from torch.utils._python_dispatch import TorchDispatchMode

from pocketvlm.distill import optim
from pocketvlm.distill.checkpoint import latest_checkpoint, load_checkpoint
from pocketvlm.distill.dropout import kept, sample_keys
from pocketvlm.distill.encoders import StudentEncoder, evaluate_path
from pocketvlm.distill.loop import RunResult, Trainer, distill_run
from pocketvlm.distill.objectives import Outputs
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.students import fit_projection, load_student
from pocketvlm.students.config import Projection
from pocketvlm.students.image import ProjectionHead
from pocketvlm.teachers.device import full_float32
from pocketvlm.teachers.kernel import KernelOptions, fit_kernel_ridge

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")
Make = Callable[..., Recipe]
every_objective = pytest.mark.parametrize(
    ("name", "options"), EVERYTHING, ids=[f"{name}-{label(options)}" for name, options in EVERYTHING]
)
# what a recipe can ask of the loop that touches a device: both closed-form starts, frozen parts, averages, a fixed bank
SHARED = (
    "train.log_every=1", "train.lr=1e-4", "train.ema_decay=0.9", "train.bank=16", "train.text_pretrain_steps=2",
    "train.steps=4", "train.batch_size=16", "train.lr_scale={image_tower: 0.3}",
    "student.fit_projection=0.5", "student.fit_text_projection=0.5",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    with full_float32():
        yield


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, toy_teacher: None) -> Make:
    def make(*overrides: str, **sections: Any) -> Recipe:
        return load_recipe(toy_recipe(world, teacher_cache, **sections), overrides)

    return make


def losses(result: RunResult) -> list[float]:
    return [row["loss"] for row in read_metrics(result.folder / "metrics.jsonl") if "loss" in row]


# ------------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("cut", ["null", "1"])
def test_float32_training_equals_the_cpus(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """Same start, same batches: the losses part only by rounding, which AdamW's sign-like first steps enlarge and,
    under the cut, a float16 cache. 1e-3 for the first step, a forward, and 2e-2 after five updates; another seed is
    off by more (below)."""
    own = (*SHARED, "train.precision=fp32", f"train.cut_after_block={cut}")
    # a cache of its own each, or the GPU would be handed what the CPU made of the part below the cut
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cpu-cache"))
    cpu = distill_run(recipe(*own, "train.device=cpu"), tmp_path / "cpu", progress=False)
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "gpu-cache"))
    gpu = distill_run(recipe(*own, "train.device=cuda"), tmp_path / "gpu", progress=False)
    other = distill_run(recipe(*own, "train.device=cuda", "train.seed=1"), tmp_path / "other", progress=False)
    ours, theirs = losses(gpu), losses(cpu)
    assert len(ours) == 6
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours == pytest.approx(theirs, rel=2e-2)
    assert losses(other) != pytest.approx(theirs, rel=2e-2)
    facts = json.loads((tmp_path / "gpu" / "environment.json").read_text())
    assert facts["device"] == f"cuda ({torch.cuda.get_device_name()})"
    assert facts["cuda"]["tf32"] is False
    # what was saved is read on the CPU, and scores as it did on the GPU
    assert next(load_student(gpu.student).parameters()).device.type == "cpu"
    assert gpu.evaluation is not None
    again = evaluate_path(gpu.student, str(recipe().data.eval), device="cuda")
    found, wanted = (e.values["model"]["image_to_text"] for e in (again, gpu.evaluation))
    assert found["R@5"] == wanted["R@5"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_half_precision_is_finite_and_near_float32(recipe: Make, tmp_path: Path, precision: str) -> None:
    found = distill_run(
        recipe(*SHARED, "train.device=cuda", f"train.precision={precision}"), tmp_path / "half", progress=False
    )
    whole = distill_run(recipe(*SHARED, "train.device=cuda", "train.precision=fp32"), tmp_path / "f", progress=False)
    assert all(math.isfinite(value) for value in losses(found))
    # 8 bits of mantissa give a few per mille per layer; the loss of a wrong scale or mask is off by far more
    assert losses(found)[0] == pytest.approx(losses(whole)[0], rel=0.05)
    assert losses(found) != losses(whole)
    state = load_student(found.student).state_dict()
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def test_fp16_lowers_its_loss_scale_instead_of_stopping(recipe: Make) -> None:
    """An overflowing gradient skips the update and halves the scale; the weights stay as they were."""
    chosen = recipe("train.device=cuda", "train.precision=fp16")
    trainer = Trainer(prepare(chosen, Reporter(False)), CUDA)
    trainer.start()
    assert trainer.scaler is not None
    trainer.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = copy.deepcopy(trainer.student.text_tower.state_dict())
    trainer.one_step(trainer.feed.make(0))
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.text_tower.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_resumes_to_the_same_loss(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """With dropout, and the state of the GPU's generator in the checkpoint. Deterministic kernels where there are
    some, so that 1e-4 is met; training by itself does not ask for them."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    wanted = recipe(
        "train.device=cuda", f"train.precision={precision}", "train.log_every=1", "train.steps=10",
        "checkpoint.every=3", "student.overrides.text.dropout=0.3", "train.ema_decay=0.9",
    )  # fmt: skip
    whole = distill_run(wanted, tmp_path / "whole", progress=False)

    class Killed(BaseException):
        pass

    step = Trainer.one_step

    def fails(self: Trainer, batch: Any) -> dict[str, Any]:
        if self.step == 7:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(Trainer, "one_step", fails)
    with pytest.raises(Killed):
        distill_run(wanted, tmp_path / "killed", progress=False)
    monkeypatch.setattr(Trainer, "one_step", step)
    left = latest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert left is not None
    assert left.name == "step-00000006.pt"
    kept = load_checkpoint(left)
    assert kept["rng"]["cuda"].dtype == torch.uint8
    assert (kept["scaler"] is not None) == (precision == "fp16")
    torch.cuda.manual_seed(99)
    resumed = distill_run(wanted, tmp_path / "killed", resume=True, progress=False)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-4)


def test_what_is_dropped_does_not_depend_on_the_device() -> None:
    keys = sample_keys(map(str, range(64)), 0, 0)
    for count in (1, 6, 1001):
        assert torch.equal(kept(keys.to(CUDA), 5, count, 0.3).cpu(), kept(keys, 5, count, 0.3))


def test_generator_states_of_the_gpu_are_put_back() -> None:
    state = optim.rng_state(CUDA)
    first = torch.rand(8, device=CUDA)
    assert not torch.equal(torch.rand(8, device=CUDA), first)
    optim.set_rng_state(state, CUDA)
    assert torch.equal(torch.rand(8, device=CUDA), first)


# ------------------------------------------------------------------------------------------------ objectives


def moved(side: Outputs, device: torch.device, *, grad: bool) -> Outputs:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(side):
        value = getattr(side, field.name)
        if field.name == "taps":
            value = {key: tap.detach().to(device).requires_grad_(grad) for key, tap in value.items()}
        elif value is not None:
            value = value.detach().to(device)
            value.requires_grad_(grad and value.is_floating_point())
        values[field.name] = value
    return Outputs(**values)


def run(name: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """The value, and the gradients of all inputs and of the objective's own parameters, on the CPU."""
    objective = build(name, **options).to(device, dtype)
    student = moved(outputs(1, dtype=dtype), device, grad=True)
    teacher = moved(outputs(2, dtype=dtype), device, grad=False)
    # rafa draws its points on the CPU, so that every machine has the same; rkd asks once which rows need float64
    with Elsewhere() if device.type == "cuda" and name not in ("rafa", "rkd") else nullcontext():
        value = total(objective, student, teacher)
        value.backward()
    assert value.device.type == device.type
    leaves = {f.name: getattr(student, f.name) for f in dataclasses.fields(student) if f.name != "taps"}
    leaves |= student.taps | dict(objective.named_parameters())
    found = {"value": value.detach().cpu()}
    return found | {k: v.grad.cpu() for k, v in leaves.items() if v is not None and v.grad is not None}


class Elsewhere(TorchDispatchMode):
    """Fails where an operator makes a tensor with dimensions on the CPU: mixed with one of the GPU it would be copied
    in every step, or be refused. Scalars are free."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            on_cpu = isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.ndim
            assert not on_cpu, f"{func} made a CPU tensor of shape {tuple(value.shape)}"
        return result


@every_objective
def test_objectives_on_the_gpu_equal_the_cpus(name: str, options: dict[str, Any]) -> None:
    """float64: 1e-9 relative to the largest number of a tensor. float32: as test_float32_and_bfloat16_are_close says,
    for values; gradients sum more terms."""
    for dtype, value_error, gradient_error in ((torch.float64, 1e-9, 1e-9), (torch.float32, 5e-5, 1e-3)):
        ours, theirs = run(name, options, dtype, CUDA), run(name, options, torch.float64, torch.device("cpu"))
        assert ours.keys() == theirs.keys()
        for key, wanted in theirs.items():
            error = float((ours[key].double() - wanted).abs().max())
            allowed = value_error if key == "value" else gradient_error
            assert error <= allowed * max(float(wanted.abs().max()), 1e-2), (key, dtype, error)


@every_objective
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_objectives_stay_in_float32_under_autocast(name: str, options: dict[str, Any], half: torch.dtype) -> None:
    objective = build(name, **options).to(CUDA)
    student = moved(outputs(1, dtype=half), CUDA, grad=True)
    teacher = moved(outputs(2, dtype=half), CUDA, grad=False)
    plain = total(objective, student, teacher)
    with torch.autocast("cuda", half):
        value = total(objective, student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=2e-5, abs=1e-6)


# ------------------------------------------------------------------------------------------------ closed forms, average


@pytest.mark.parametrize("rows", [20, 90])
def test_ridge_start_of_a_projection_on_the_gpu_equals_the_cpus(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features, targets = (torch.randn(rows, width, generator=generator) for width in (40, 12))
    own = ProjectionHead(Projection(norm="batch"), 40, 12)
    other = copy.deepcopy(own).to(CUDA)
    fit_projection(own, features, targets, ridge=0.5)
    fit_projection(other, features.to(CUDA), targets.to(CUDA), ridge=0.5)
    for name, value in own.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name].cpu(), value, rtol=1e-5, atol=1e-6)


def test_kernel_ridge_on_the_gpu_equals_the_cpus() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 2, 10, generator=generator)
    targets = torch.nn.functional.normalize(torch.randn(30, 6, generator=generator), dim=-1)
    own = fit_kernel_ridge(features, targets, (4, 6), KernelOptions())
    other = fit_kernel_ridge(features.to(CUDA), targets.to(CUDA), (4, 6), KernelOptions())
    assert (other.logit_scale, other.recall5) == (own.logit_scale, own.recall5)
    for name, value in own.state.items():
        torch.testing.assert_close(other.state[name].cpu(), value, rtol=1e-5, atol=1e-6)


def test_average_on_the_gpu_equals_the_cpus() -> None:
    torch.manual_seed(0)
    own = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    other = copy.deepcopy(own).to(CUDA)
    averages = optim.Average(own, 0.9), optim.Average(other, 0.9)
    for _ in range(3):
        with torch.no_grad():
            for module in (own, other):
                module[0].weight.mul_(1.5)  # type: ignore[union-attr]
        averages[0].update(own)
        averages[1].update(other)
    # through a checkpoint, which is read on the CPU
    restored = optim.Average(other, 0.9)
    restored.load_state_dict(
        {"updates": 3, "state": {k: v.cpu() for k, v in averages[1].state_dict()["state"].items()}}
    )
    with optim.replaced(other, restored.state_dict()["state"]), optim.replaced(own, averages[0].state_dict()["state"]):
        assert other[0].weight.is_cuda
        torch.testing.assert_close(other[0].weight.cpu(), own[0].weight, rtol=1e-6, atol=1e-7)


def test_a_student_embeds_alike_on_both_devices(recipe: Make) -> None:
    prepared = prepare(recipe("train.device=cuda"), Reporter(False))
    student = prepared.student.eval()
    pictures = [sample.image.read() for sample in prepared.samples[:8]]
    texts = ["red thing", "teal", "a b c d e f g h i j k"]
    encoder = StudentEncoder(student)
    wanted = encoder.embed_image(pictures), encoder.embed_text(texts)
    encoder = StudentEncoder(student.to(CUDA), device="cuda")
    assert encoder.embed_image(pictures) == pytest.approx(wanted[0], abs=1e-5)
    assert encoder.embed_text(texts) == pytest.approx(wanted[1], abs=1e-5)
