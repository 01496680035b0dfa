"""A plan's seconds are those of the run: the quick recipe's student on built-in data, timed before, run, timed after.

In processor seconds of one thread, which other work on the machine changes little, and with one timing on each side of
the run, because what it changes it changes slowly.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from pocketvlm.data import open_data
from pocketvlm.distill.devices import Ledger
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.plan import Planner
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.rehearsal import Stage
from pocketvlm.distill.stand_in import TeacherShapes
from pocketvlm.teachers.device import full_float32

CHANGES = (
    "data.train=openmoji?pool=student&fold=0&captions=0.1&limit=64", "data.eval=null", "views.count=1",
    "data.words.size=400", "student.fit_projection=null", "student.fit_text_projection=null", "train.bank=256",
    "train.text_pretrain_steps=3", "train.steps=5", "train.batch_size=32", "train.text_batch=64", "train.device=cpu",
    "train.threads=1", "train.warmup_steps=1", "student.fit_views=1",
)  # fmt: skip


def run_seconds(recipe: Recipe) -> float:
    """Processor seconds of all steps of a real run, their batches made beside them."""
    trainer = Trainer(prepare(recipe, Reporter(False)), torch.device("cpu"))
    started = time.process_time()
    with full_float32():
        for step in range(trainer.total):
            trainer.one_step(trainer.feed.make(step))
    return time.process_time() - started


def test_the_prediction_holds_within_a_quarter(tmp_path: Path) -> None:
    recipe = load_recipe("quick", [*CHANGES, f"teacher.cache={tmp_path / 'teacher'}"])
    source = open_data(recipe.data.train)
    # what the teacher answers decides no second of a step, only its shapes do
    shapes = {"openmoji-lit?fold=0": TeacherShapes("openmoji-lit?fold=0", 384, 1280, 384)}
    stage = Stage(recipe, source, shapes, tmp_path / "rehearsal", timed=True, full_texts=False)

    def predicted() -> float:
        with full_float32():
            planner = Planner(recipe, stage.play(), shapes, len(source), 1, source, Ledger(), None)
        return planner.values(None)["time"]["training_cpu_s"]

    before = predicted()
    measured = run_seconds(recipe)
    after = predicted()
    print(f"predicted {before:.2f} and {after:.2f} s, measured {measured:.2f} s")
    assert (before + after) / 2 == pytest.approx(measured, rel=0.25)
