"""Two ranks train what one rank trains, a lost rank ends the others, and only rank 0 writes.

The ranks are two processes that run this very file as a script, in float64, with the environment that torchrun sets;
rank 0 then trains the same recipes alone. One pair of processes serves all tests.
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from distill_toys import make_world, toy_recipe, use_toy_teacher
from rank_toys import free_ports, two_processes

from pocketvlm.distill.checkpoint import latest_checkpoint, load_checkpoint
from pocketvlm.distill.guards import RunStopped
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.masking import NORMS
from pocketvlm.distill.objectives import blocks
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.ranks import RankError, Ranks, _meeting, joined_ranks, restarted
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.teachers.device import pick_device

CPU = torch.device("cpu")
STEPS = 3
# statistics stand still, so that no row sees the others of its rank; 7 and 15 rows leave the ranks unequal
HELD = ("train.hold_statistics=[image_tower]", "train.batch_size=7", "train.text_batch=15", f"train.steps={STEPS}")
# captioned pictures come first in a batch, so that rank 1 has none
FEW = ("train.captioned_fraction=0.3", "train.text_batch=0", "train.freeze={image_tower: 2}")
TAPPED = "objectives=[{name: clip}, {name: token-alignment}, {name: masked-language}]"
DROPPED = (
    "student.overrides.text.dropout=0.1",
    "student.overrides.image.backbone_args={drop_rate: 0.1, drop_path_rate: 0.1}",
)
SCENARIOS: dict[str, tuple[str, ...]] = {
    "pairs, texts and projectors": HELD,
    "a text phase first, and a fixed bank": (*HELD, "train.text_pretrain_steps=1", "train.bank=20", "train.seed=3"),
    "a rank without captions": (*HELD, *FEW, "objectives=[{name: crd}, {name: clip}, {name: hint}]"),
    "taps and a train-only module": (*HELD, *FEW, TAPPED),
    "the momentum model": (*HELD, *FEW, "objectives=[{name: momentum}, {name: feature}]"),
    "dropout and drop-path, in parts": (*HELD, *FEW, *DROPPED, TAPPED, "train.micro_batch=2"),
    "balanced, in parts": (*HELD, "train.balance=gradient-norm", "train.micro_batch=2"),
    "every loss whole": HELD,
}


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(toy_recipe(folder / "world" / "world.jsonl", folder / "cache"), overrides)


def trained(made: Trainer) -> dict[str, Any]:
    """Losses of all steps, and everything that was trained."""
    made.start()
    losses = [made.one_step(made.feed.make(step))["loss"] for step in range(made.total)]
    state = {**made.student.state_dict(), **made.objectives.state_dict(prefix="objectives.")}
    return {"losses": losses, "state": {name: value.clone() for name, value in state.items()}}


def in_float64() -> None:
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]


def main(rank: int, folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    use_toy_teacher()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    found: dict[str, Any] = {"in float32": _in_float32(folder, ports)}
    in_float64()
    os.environ["MASTER_PORT"] = ports[1]
    quiet = Reporter(False)
    with joined_ranks("cpu") as ranks:
        with ranks.first_before_others():
            prepared = prepare(recipe(folder), quiet)
        for name, overrides in SCENARIOS.items():
            own = prepared.with_recipe(recipe(folder, *overrides))
            # the batches are small: losses are shared out all the same, but in one of the runs
            blocks.LEAST_SHARED = 1 << 20 if name == "every loss whole" else 0
            found[name] = trained(Trainer(own, CPU, ranks))
        found["wanted"] = ranks.any(ranks.first, False)
        made = Trainer(own, CPU, ranks)
        batch = made.feed.make(0)
        if rank == 1:
            batch.teacher_image *= float("nan")
        found["skipped"] = made.one_step(batch)
        with torch.no_grad():
            made.student.log_scale += rank
        found["differs"] = _message(IntegrityError, lambda: ranks.check_equal(student=made.student))
        found["told"] = _message(PermissionError if rank == 0 else RankError, lambda: ranks.from_first(_forbidden))
        found["mean"] = _mean(ranks)
    if rank == 0:
        for name, overrides in SCENARIOS.items():
            whole = [key for key in overrides if "micro_batch" not in key]
            found[f"alone: {name}"] = trained(Trainer(prepared.with_recipe(recipe(folder, *whole)), CPU))
    torch.save(found, folder / f"{rank}.pt")


def _in_float32(folder: Path, ports: list[str]) -> dict[str, Any]:
    """A whole run with its files, and one in which rank 1 vanishes."""
    os.environ["MASTER_PORT"] = ports[0]
    whole = recipe(folder, "train.steps=4", "checkpoint.every=2", "train.text_batch=4")
    result = distill_run(whole, folder / "run", progress=False)
    os.environ["MASTER_PORT"] = ports[2]
    real = Trainer.one_step

    def dies(self: Trainer, batch: Any) -> Any:
        if self.step == 2 and self.ranks.rank == 1:
            raise ValueError("this rank breaks")
        return real(self, batch)

    Trainer.one_step = dies  # type: ignore[method-assign]
    broken = ValueError if os.environ["RANK"] == "1" else RankError
    message = _message(broken, lambda: distill_run(whole, folder / "lost", progress=False))
    os.environ["MASTER_PORT"] = ports[3]

    def told(self: Trainer, batch: Any) -> Any:
        if self.step == 1 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    Trainer.one_step = told  # type: ignore[method-assign]
    stopped = _message(RunStopped, lambda: distill_run(whole, folder / "stopped", progress=False))
    Trainer.one_step = real  # type: ignore[method-assign]
    return {
        "loss": result.final_loss,
        "scored": result.evaluation is not None,
        "lost": message,
        "stopped": stopped,
    }


def _message(kind: type[BaseException], call: Any) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing was raised"


def _forbidden() -> None:
    raise PermissionError("rank 0 may not")


def _mean(ranks: Ranks) -> list[Any]:
    """Gradients of 1 and 3, of 5 and none, and of none on both, averaged."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 1.0 + 2 * ranks.rank)
    if ranks.first:
        parameters[1].grad = torch.full((2,), 5.0)
    ranks.average_gradients(parameters)
    norm = nn.BatchNorm1d(2)
    norm(torch.tensor([[1.0, 0.0], [3.0, 4.0]]) * (1 + ranks.rank))
    ranks.average_statistics(norm)
    return [None if p.grad is None else p.grad.tolist() for p in parameters] + [norm.running_mean.tolist()]


# ------------------------------------------------------------------------------------------------ in the test's process


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    make_world(folder / "world", captioned=0.5)
    return folder, two_processes(__file__, folder, *free_ports(4))


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_train_what_one_trains(two: Any, name: str) -> None:
    """Losses and everything trained; 1e-8 is what Adam makes of float64 rounding in gradients near its epsilon."""
    _, ranks = two
    wanted = ranks[0][f"alone: {name}"]
    assert len(wanted["losses"]) >= STEPS
    for found in ranks:
        assert found[name]["losses"] == pytest.approx(wanted["losses"], rel=1e-9)
        assert found[name]["state"].keys() == wanted["state"].keys()
        for key, value in wanted["state"].items():
            torch.testing.assert_close(found[name]["state"][key], value, rtol=1e-6, atol=1e-8, msg=key)
    for key, value in ranks[0][name]["state"].items():
        assert torch.equal(value, ranks[1][name]["state"][key]), key


def test_only_rank_0_writes_and_another_number_of_ranks_goes_on(two: Any, toy_teacher: None) -> None:
    folder, ranks = two
    first, second = (found["in float32"] for found in ranks)
    assert first["loss"] == second["loss"]
    assert (first["scored"], second["scored"]) == (True, False)
    run = folder / "run"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 4, 4]
    assert {path.name for path in (run / "checkpoints").iterdir() if path.suffix == ".pt"} == {
        "step-00000002.pt", "step-00000004.pt",
    }  # fmt: skip
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    trainer = Trainer(prepare(load_recipe(run / "recipe.yaml"), Reporter(False)), CPU)
    trainer.restore(load_checkpoint(checkpoint), checkpoint)
    assert trainer.step == 4
    assert trainer.one_step(trainer.feed.make(3))["loss"] > 0


def test_a_rank_that_breaks_ends_the_others(two: Any) -> None:
    _, ranks = two
    assert "rank 0 of 2 lost the others" in ranks[0]["in float32"]["lost"]
    assert ranks[1]["in float32"]["lost"] == "this rank breaks"


def test_a_signal_to_one_rank_stops_all_after_the_same_step(two: Any) -> None:
    folder, ranks = two
    said = [found["in float32"]["stopped"] for found in ranks]
    assert "a signal to another rank stopped the run after step 2 of 4; it saved step-00000002.pt" in said[0]
    assert said[1] == ""
    assert [path.name for path in (folder / "stopped" / "checkpoints").glob("*.pt")] == ["step-00000002.pt"]


def test_a_bad_batch_of_one_rank_is_skipped_by_all(two: Any) -> None:
    for found in two[1]:
        assert found["skipped"]["skipped"] == 1
        assert "the loss is not finite" in found["skipped"]["skipped_because"]


def test_what_fails_on_rank_0_fails_on_all(two: Any) -> None:
    _, ranks = two
    assert ranks[0]["told"] == "rank 0 may not"
    assert ranks[1]["told"] == "rank 0 stopped, and all other ranks with it: rank 0 may not"


def test_ranks_that_drift_apart_are_told_where(two: Any) -> None:
    for found in two[1]:
        assert "student.log_scale on rank 1 is not what it is on rank 0" in found["differs"]


def test_means_and_decisions_are_the_same_on_all_ranks(two: Any) -> None:
    for found in two[1]:
        assert found["wanted"] == (True, False)
        # running means move a tenth of the way to 2 on rank 0 and to 4 on rank 1
        assert found["mean"][:3] == [[2.0, 2.0], [2.5, 2.5], None]
        assert found["mean"][3] == pytest.approx([0.3, 0.3])


def test_parts_are_contiguous_and_complete() -> None:
    for size in (2, 7, 8):
        for count in (1, 2, 3):
            rows = [list(range(size))[Ranks(rank, count).part(size)] for rank in range(count)]
            assert [row for part in rows for row in part] == list(range(size))
            assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_batch_smaller_than_the_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a step has 3 rows \(train\.batch_size .* 4 ranks"):
        Ranks(0, 4).check_batches(3, 0)
    with pytest.raises(UsageError, match=r"a step has 2 rows \(train\.text_batch"):
        Ranks(0, 4).check_batches(8, 2)
    Ranks(0, 4).check_batches(4, 0)


def test_batch_norms_of_all_ranks_are_for_cuda() -> None:
    """Converted ones keep names and activations, and evaluate as before."""
    trunk = timm.create_model("mobilenetv4_conv_small_035").eval()
    with pytest.raises(UsageError, match="sync_batchnorm was asked for on cpu, and torch has it for CUDA only"):
        Ranks(0, 2).synchronised(trunk, CPU)
    assert Ranks(0, 1).synchronised(trunk, CPU) is trunk
    pictures = torch.randn(2, 3, 32, 32)
    before, names = trunk(pictures), list(trunk.state_dict())
    after = Ranks(0, 2).synchronised(trunk, torch.device("cuda"))
    norms = [module for module in after.modules() if isinstance(module, NORMS)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(after.state_dict()) == names
    torch.testing.assert_close(after.eval()(pictures), before)


def test_an_environment_that_is_no_torchruns_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="RANK is '' where a number is needed"), joined_ranks("cpu"):
        pass
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="'cuda:1' and the run has 2 ranks"), joined_ranks("cuda:1"):
        pass
    assert not restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restarted()


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="torch sees 2 CUDA devices"):
        pick_device("auto")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])


def test_ranks_that_start_again_meet_each_other_and_not_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one store, which torchrun keeps over all starts; a word that nobody follows lies there too."""
    kept = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(kept, 0, 0)]))
    kept.set("pocketvlm/hello/1", "of a process that is gone")
    with ThreadPoolExecutor(3) as pool:
        for start in ("first", "second"):
            stores = [one.result(60) for one in [pool.submit(_meeting, rank, 3) for rank in (1, 0, 2)]]
            assert not any(store.check(["address"]) for store in stores)
            stores[1].set("address", start)
            assert [store.get("address") for store in stores] == [start.encode()] * 3
