"""The engine on a GPU: parts, recomputation, compiled towers, bad steps, blocks, streams, caches, and two ranks."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from distill_toys import make_world, toy_recipe, use_toy_teacher
from objective_toys import total
from rank_toys import free_ports, two_processes
from stream_toys import write_world
from test_stream_runs import rows_of, stream_recipe

from pocketvlm.distill import ranks as ranks_module
from pocketvlm.distill.cache_check import verify
from pocketvlm.distill.cache_teacher import cache_teacher
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.objectives import Outputs, Widths, blocks, build_objective
from pocketvlm.distill.objectives.blocks import similarity_bytes
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.ranks import joined_ranks
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.teachers.device import full_float32

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")
HELD = ("train.hold_statistics=[image_tower]", "train.device=cuda", "train.precision=fp32")
Build = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def _the_same_kernels_each_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with full_float32():
        yield


@pytest.fixture
def trainer(world: Path, teacher_cache: Path, toy_teacher: None) -> Build:
    def build(*overrides: str) -> Trainer:
        made = Trainer(prepare(load_recipe(toy_recipe(world, teacher_cache), overrides), Reporter(False)), CUDA)
        made.start()
        return made

    return build


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("tars") / "cc")


def first_step(made: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of the first step, and its gradients by name."""
    loss = made.one_step(made.feed.make(0))["loss"]
    named = [*made.student.named_parameters(), *made.objectives.named_parameters(prefix="objectives")]
    return loss, {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def check_equal(ours: Any, theirs: Any, error: float) -> None:
    """error: of the loss, and of a gradient relative to the largest of all gradients."""
    assert ours[0] == pytest.approx(theirs[0], rel=error)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(float(value.abs().max()) for value in theirs[1].values())
    for name, value in theirs[1].items():
        assert float((ours[1][name] - value).abs().max()) <= error * largest, name


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.balance=gradient-norm", "train.captioned_fraction=0.3"),
        ("train.bank=20", "train.captioned_fraction=0.25", "train.text_batch=2", "train.batch_size=16"),
        ("objectives=[{name: momentum}, {name: hint}]", "train.text_batch=0"),
    ],
)
def test_the_step_in_parts_is_the_step(trainer: Build, overrides: tuple[str, ...]) -> None:
    whole = first_step(trainer(*HELD, *overrides))
    check_equal(first_step(trainer(*HELD, *overrides, "train.micro_batch=3")), whole, 2e-4)


@pytest.mark.parametrize("more", [(), ("train.micro_batch=3",)])
def test_blocks_that_run_again_give_the_same_gradients(trainer: Build, more: tuple[str, ...]) -> None:
    """With dropout, whose numbers the second run must draw again from the GPU's generator."""
    own = (*HELD, *more, "student.overrides.text.dropout=0.3")
    check_equal(first_step(trainer(*own, "train.checkpoint_activations=true")), first_step(trainer(*own)), 2e-4)


def test_compiled_towers_give_the_same_gradients(trainer: Build) -> None:
    """In bf16 both part from float32 by rounding: the compiled ones by no more than the others."""
    plain, compiled = first_step(trainer(*HELD)), first_step(trainer(*HELD, "train.compile=true"))
    check_equal(compiled, plain, 1e-3)
    half = [first_step(trainer(*HELD, "train.precision=bf16", *more)) for more in ((), ("train.compile=true",))]

    def away(found: Any) -> float:
        return sum(float((found[1][name] - value).square().sum()) for name, value in plain[1].items())

    assert away(half[1]) <= 2 * away(half[0])
    assert half[1][0] == pytest.approx(plain[0], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_step_changes_nothing_and_is_counted(trainer: Build, precision: str) -> None:
    made = trainer("train.device=cuda", f"train.precision={precision}", "train.ema_decay=0.9")
    made.one_step(made.feed.make(0))
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    batch = made.feed.make(1)
    assert batch.teacher_image is not None
    batch.teacher_image = batch.teacher_image * float("nan")
    row = made.one_step(batch)
    assert "loss is not finite" in row["skipped_because"]
    assert row["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in made.student.state_dict().items())
    assert math.isfinite(made.one_step(made.feed.make(2))["loss"])


@pytest.mark.parametrize("name", ["clip", "siglip", "crd", "icl", "cross-kd", "affinity"])
def test_blocks_equal_the_matrix_and_take_less(name: str) -> None:
    rows, width = 4096, 64
    generator = torch.Generator(CUDA).manual_seed(0)

    def side(grad: bool) -> Outputs:
        image, text = (torch.randn(rows, width, generator=generator, device=CUDA) for _ in range(2))
        scale = torch.tensor(20.0, device=CUDA)
        return Outputs(image=image.requires_grad_(grad), text=text.requires_grad_(grad), logit_scale=scale)

    widths = Widths(embedding=width)
    objective = build_objective(name, student=widths, teacher=widths, seed=0).to(CUDA)
    student, teacher = side(True), side(False)
    found = []
    for limit in (1 << 40, 4 << 20):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        student.image.grad = student.text.grad = None  # type: ignore[union-attr]
        with similarity_bytes(limit):
            value = total(objective, student, teacher)
        value.backward()
        taken = torch.cuda.max_memory_allocated() - before
        assert student.image.grad is not None
        found.append((float(value.detach()), student.image.grad.clone(), taken))
    (whole, gradient, held), (blocks, ours, less) = found
    assert blocks == pytest.approx(whole, rel=1e-5)
    assert float((ours - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max())
    assert held >= rows * rows * 4
    assert less < held / 2


# ------------------------------------------------------------------------------------------------ streams and caches


class Killed(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_with_a_live_teacher_is_killed_and_continues(
    tmp_path: Path, shards: Path, toy_teacher: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    value = stream_recipe(shards)
    value["data"]["stream"]["workers"] = workers
    value["train"] |= {"device": "cuda", "precision": "fp32", "log_every": 1}
    recipe = load_recipe(value)
    distill_run(recipe, tmp_path / "whole", progress=False)
    step = Trainer.one_step

    def dies(self: Trainer, batch: Any) -> Any:
        if self.step == 4:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(Trainer, "one_step", dies)
    with pytest.raises(Killed):
        distill_run(recipe, tmp_path / "killed", progress=False)
    monkeypatch.setattr(Trainer, "one_step", step)
    distill_run(recipe, tmp_path / "killed", resume=True, progress=False)
    ours, theirs = rows_of(tmp_path / "killed"), rows_of(tmp_path / "whole")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["loss"] for row in ours if "loss" in row] == pytest.approx(
        [row["loss"] for row in theirs if "loss" in row], rel=1e-4
    )
    rows = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    assert all(row["cuda_max_mb"] > 0 for row in rows if "loss" in row)
    saved = torch.load(tmp_path / "killed" / "checkpoints" / "step-00000006.pt", weights_only=True)
    other = torch.load(tmp_path / "whole" / "checkpoints" / "step-00000006.pt", weights_only=True)
    assert saved["data"] == other["data"], "no sample was repeated or missed"


def test_a_cache_made_on_the_gpu_holds_and_trains(tmp_path: Path, shards: Path, toy_teacher: None) -> None:
    value = stream_recipe(shards)
    value["train"]["device"] = "cuda"
    assert cache_teacher(load_recipe(value), tmp_path / "made", report=Reporter(False))
    assert all(one.holds for one in verify(tmp_path / "made", samples=9, report=Reporter(False)))
    cached = stream_recipe(shards, teacher={"spec": "toy", "cache": str(tmp_path / "made")})
    cached["train"] |= {"device": "cuda", "precision": "bf16"}
    result = distill_run(load_recipe(cached), tmp_path / "run", progress=False)
    assert math.isfinite(result.final_loss)


# ------------------------------------------------------------------------------------------------ ranks


def main(rank: int, folder: Path, port: str, backend: str) -> None:
    """One of two ranks. "gloo" puts both on one GPU, which NCCL refuses: all but the wire is what a cluster does."""
    use_toy_teacher()
    torch.backends.cudnn.deterministic = True
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": port}
    device = torch.device("cuda", rank if backend == "nccl" else 0)
    if backend == "gloo":
        join = dist.init_process_group
        ranks_module.pick_device = lambda _: device  # type: ignore[attr-defined]
        dist.init_process_group = lambda _, device_id, **how: join("gloo", **how)  # type: ignore[assignment]
    blocks.LEAST_SHARED = 1
    found: dict[str, Any] = {}
    with full_float32(), joined_ranks("cuda") as ranks:
        recipe = load_recipe(toy_recipe(folder / "world" / "world.jsonl", folder / "cache"), TWO)
        with ranks.first_before_others():
            prepared = prepare(recipe, Reporter(False))
        made = Trainer(prepared, device, ranks)
        made.start()
        found["losses"] = [made.one_step(made.feed.make(step))["loss"] for step in range(made.total)]
        ranks.check_equal(student=made.student, objectives=made.objectives)
        batch = made.feed.make(0)
        if rank == 1:
            assert batch.teacher_image is not None
            batch.teacher_image = batch.teacher_image * float("nan")
        found["skipped"] = made.one_step(batch)["skipped"]
        found["state"] = {name: value.cpu() for name, value in made.student.state_dict().items()}
    torch.save(found, folder / f"{rank}.pt")


# matrices of any size are shared out; the parts drop rows, keyed by sample
TWO = (*HELD, "train.steps=4", "train.batch_size=7", "train.text_batch=15", "train.micro_batch=2", "train.lr=1e-4")
TWO += ("student.overrides.text.dropout=0.1",)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_two_ranks_train_what_one_trains(tmp_path: Path, backend: str) -> None:
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for each of two ranks, and this machine has one")
    make_world(tmp_path / "world")
    first, second = two_processes(__file__, tmp_path, *free_ports(1), backend, timeout=300)
    assert first["losses"] == second["losses"]
    assert first["skipped"] == second["skipped"] == 1
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    with pytest.MonkeyPatch.context() as patch:
        use_toy_teacher(patch)
        recipe = load_recipe(toy_recipe(tmp_path / "world" / "world.jsonl", tmp_path / "cache"), TWO)
        alone = Trainer(prepare(recipe, Reporter(False)), CUDA)
        alone.start()
        losses = [alone.one_step(alone.feed.make(step))["loss"] for step in range(alone.total)]
    assert first["losses"] == pytest.approx(losses, rel=1e-3)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
