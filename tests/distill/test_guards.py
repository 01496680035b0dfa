"""Bad steps are skipped, bad weights never saved, signals and full disks end a run that can go on; one run a folder."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import toy_recipe

from pocketvlm import cli
from pocketvlm.distill import guards
from pocketvlm.distill.checkpoint import latest_checkpoint, load_checkpoint
from pocketvlm.distill.feed import Feed
from pocketvlm.distill.guards import (
    STOPPED,
    DivergedError,
    RunStopped,
    StopSignals,
    locked,
)
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import LOCK, read_metrics
from pocketvlm.edge.errors import UsageError

CPU = torch.device("cpu")
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, toy_teacher: None) -> Make:
    def make(*overrides: str) -> Recipe:
        return load_recipe(toy_recipe(world, teacher_cache), ("eval.metrics=[retrieval]", *overrides))

    return make


@pytest.fixture(scope="module")
def inputs() -> list[Prepared]:
    return []


@pytest.fixture
def trainer(recipe: Make, inputs: list[Prepared]) -> Callable[..., Trainer]:
    """Trainers over inputs that are prepared once."""

    def make(*overrides: str) -> Trainer:
        if not inputs:
            inputs.append(prepare(recipe(), Reporter(False)))
        return Trainer(inputs[0].with_recipe(recipe(*overrides)), CPU)

    return make


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """A target that is no number in these 0-based steps."""
    real = Feed.make

    def make(self: Feed, step: int) -> Any:
        batch = real(self, step)
        if step in steps:
            assert batch.teacher_image is not None
            batch.teacher_image[0, 0] = float("nan")
        return batch

    monkeypatch.setattr(Feed, "make", make)


def everything(made: Trainer) -> dict[str, torch.Tensor]:
    average = made.average.module.state_dict() if made.average is not None else {}
    moments = {
        f"{number}.{key}": value
        for number, state in enumerate(made.optimizer.state.values())
        for key, value in state.items()
    }
    named = [made.student.state_dict(), made.objectives.state_dict(prefix="o."), moments]
    found = {name: value for part in named for name, value in part.items()}
    return {name: value.clone() for name, value in {**found, **{f"a.{k}": v for k, v in average.items()}}.items()}


# ------------------------------------------------------------------------------------------------ bad steps


def test_one_bad_batch_changes_nothing_and_is_counted(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 1)
    made = trainer()
    rows = [made.one_step(made.feed.make(0))]
    before = everything(made)
    rows.append(made.one_step(made.feed.make(1)))
    after = everything(made)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert rows[1]["step"] == made.step == 2
    assert rows[1]["skipped"] == 1
    assert "crd" in rows[1]["skipped_because"]
    assert "loss" not in rows[1]
    rows.append(made.one_step(made.feed.make(2)))
    assert rows[2]["loss"] > 0
    assert (rows[0]["skipped"], rows[2]["skipped"]) == (0, 1)
    assert any(not torch.equal(value, before[name]) for name, value in everything(made).items())


def test_statistics_that_a_bad_forward_moved_are_put_back(trainer: Callable[..., Trainer]) -> None:
    made = trainer()
    made.one_step(made.feed.make(0))
    before = everything(made)
    first = next(module for module in made.student.image_tower.modules() if isinstance(module, torch.nn.Conv2d))
    hook = first.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert "loss" not in made.one_step(made.feed.make(1))
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in everything(made).items())


def test_bad_steps_in_a_row_end_the_run_and_name_what_is_good(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 6 falls into the bad row and is not written."""
    poisoned(monkeypatch, 4, 5, 6)
    with pytest.raises(
        DivergedError, match=r"the loss is not finite at step 7 \(in .*crd.*2 steps in a row.*step-00000003\.pt"
    ):
        distill_run(recipe("train.max_skipped=2", "checkpoint.every=3"), tmp_path / "run", progress=False)
    left = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert left is not None
    assert all(torch.isfinite(value).all() for value in load_checkpoint(left)["student"].values())
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["skipped"]) for row in rows] == [(1, 0), (4, 0), (5, 1), (6, 2)]


def test_a_good_step_between_bad_ones_starts_the_count_again(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, 1, 3, 5)
    result = distill_run(recipe("train.max_skipped=1"), tmp_path / "run")
    assert "3 of 8 steps were skipped" in capsys.readouterr().err
    assert result.final_loss > 0
    assert "skipped_because" not in (tmp_path / "run" / "recipe.yaml").read_text()
    assert (tmp_path / "run" / "report.html").is_file()
    # what a resumed run goes on counting from
    last = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is not None
    assert load_checkpoint(last)["guard"] == {"skipped": 3, "in_a_row": 0}


def test_a_leap_of_the_gradient_is_not_followed(trainer: Callable[..., Trainer]) -> None:
    made = trainer("train.skip_norm_above=1e-6")
    before = everything(made)
    row = made.one_step(made.feed.make(0))
    assert row["skipped_because"].startswith("the gradient norm ")
    assert row["skipped_because"].endswith("is above train.skip_norm_above 1e-06")
    assert all(torch.equal(value, before[name]) for name, value in everything(made).items())
    wide = trainer("train.skip_norm_above=1e6")
    assert wide.one_step(wide.feed.make(0))["loss"] > 0


def test_a_gradient_that_is_no_number_is_not_followed(trainer: Callable[..., Trainer]) -> None:
    made = trainer("train.max_skipped=1")
    hook = made.student.log_scale.register_hook(lambda gradient: gradient * float("nan"))
    before = everything(made)
    row = made.one_step(made.feed.make(0))
    assert row["skipped_because"] == "the gradient norm is not finite"
    assert all(torch.equal(value, before[name]) for name, value in everything(made).items())
    with pytest.raises(DivergedError, match="the gradient norm is not finite at step 2, after 1 steps in a row"):
        made.one_step(made.feed.make(1))
    hook.remove()


def test_no_checkpoint_is_made_of_weights_that_are_no_numbers(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    made = trainer()
    made.guard.checkpoints = tmp_path
    made._check_weights()
    with torch.no_grad():
        made.student.text_tower.token.weight[3, 1] = float("inf")
    with pytest.raises(DivergedError, match=r"student\.text_tower\.token\.weight is not finite after step 0"):
        made._check_weights()


# ------------------------------------------------------------------------------------------------ signals, restarts


def signalled(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int) -> None:
    real = Trainer.one_step

    def one_step(self: Trainer, batch: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), number)
        return real(self, batch)

    monkeypatch.setattr(Trainer, "one_step", one_step)


def test_sigterm_saves_and_the_run_goes_on_to_the_same_end(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the third step, between two checkpoints; a restart by torchrun goes on by itself."""
    wanted = recipe("train.log_every=1", "student.overrides.text.dropout=0.2")
    whole = distill_run(wanted, tmp_path / "whole", progress=False)
    file = tmp_path / "recipe.yaml"
    file.write_text(wanted.to_yaml())
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, 2)
        with pytest.raises(SystemExit) as left:
            cli.main(["distill", str(file), "--out", str(tmp_path / "run")])
    assert left.value.code == STOPPED == 75
    said = capsys.readouterr().err
    assert "SIGTERM stopped the run after step 3 of 8; it saved step-00000003.pt: go on with" in said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (tmp_path / "run" / LOCK).exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    resumed = distill_run(wanted, tmp_path / "run", overwrite=True, progress=False)
    assert resumed.final_loss == whole.final_loss
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [*range(1, 9), 8]


def test_control_c_is_heard_too_and_a_second_one_is_not_waited_for(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(monkeypatch, signal.SIGINT, 1)
    with pytest.raises(RunStopped, match="SIGINT stopped the run after step 2 of 8"):
        distill_run(recipe(), tmp_path / "run", progress=False)
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGINT) is not before
        os.kill(os.getpid(), signal.SIGINT)
        assert (signals.asked, signals.name) == (True, "SIGINT")
        assert signal.getsignal(signal.SIGINT) is before


def test_resume_starts_where_there_is_nothing_yet(recipe: Make, tmp_path: Path) -> None:
    """A job that is always started with --resume: in no folder, and before the first checkpoint."""
    short = recipe("train.steps=2", "train.warmup_steps=1")
    first = distill_run(short, tmp_path / "run", resume=True, progress=False)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    again = distill_run(short, tmp_path / "run", resume=True, progress=False)
    assert again.final_loss == first.final_loss
    # what cannot start leaves nothing that a corrected recipe would not fit to
    with pytest.raises(UsageError, match="embed_dim is 24"):
        distill_run(recipe("student.embed_dim=24"), tmp_path / "bad", resume=True, progress=False)
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------------------------------------ the folder


def test_two_runs_on_one_folder_are_refused(recipe: Make, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out):
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match=rf"is in use by process {os.getpid()} on .*, and two runs would"):
                distill_run(recipe(), out, progress=False, **flags)
        assert [path.name for path in out.iterdir()] == [LOCK]
    assert not out.exists()


def test_a_lock_that_was_left_behind_is_no_obstacle_even_with_a_worker_alive(tmp_path: Path) -> None:
    """The holder forks a worker and is killed; the worker lives on."""
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(tmp_path / "run"):
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(write, str(worker).encode())
            time.sleep(30)
        os._exit(0)
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(UsageError, match=f"in use by process {holder}"), locked(tmp_path / "run"):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert (tmp_path / "run" / LOCK).exists()
        with locked(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / LOCK).read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(read)
        os.close(write)


def test_a_folder_that_cannot_be_written_is_refused(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(guards.os, "open", read_only)
    with pytest.raises(UsageError, match=r"cannot be written to \(Read-only file system\), so nothing of a run"):
        distill_run(recipe(), tmp_path / "run", progress=False)


def test_a_clock_that_jumps_changes_nothing(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = distill_run(recipe("train.log_every=1"), tmp_path / "whole", progress=False)
    leaps = itertools.cycle([0.0, 4e9, 1e3])
    monkeypatch.setattr(time, "time", lambda: next(leaps))
    jumped = distill_run(recipe("train.log_every=1"), tmp_path / "run", progress=False)
    assert jumped.final_loss == whole.final_loss
    assert 0 < jumped.seconds < 600
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["step_s"] < 600 for row in rows if "loss" in row)
