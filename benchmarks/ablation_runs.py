"""One run of `benchmarks.ablation`, and what all runs of a fold and protocol share.

`make_pack` writes the latter to one file: pictures, captions, the teacher's stored outputs and the evaluation's
questions. From it and a start, a run needs no data set, word list, teacher or pretrained weights on its machine.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ablation_arms import (
    BASE,
    TEXT,
    Arm,
    arm_named,
    recipe_of,
    run_digest,
    started_at,
    text_changes,
    text_digest,
)
from pocketvlm.data.openmoji_groups import base_concept
from pocketvlm.data.sample import ImageRef, Sample
from pocketvlm.data.source import DataSource
from pocketvlm.distill import optim
from pocketvlm.distill.batches import Pictures, prefetch
from pocketvlm.distill.evaluate import score
from pocketvlm.distill.loop import DivergedError, Trainer, distill_run
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.taps import asked_taps
from pocketvlm.students import Student, load_student, save_student
from pocketvlm.teachers.device import describe_device, pick_device

SILENT = Reporter(False)
DIRECTIONS = ("image_to_text", "text_to_image")
SUPERSET: Arm = arm_named("openmoji-whole")
"""Reads everything that any arm of the stages reads: its inputs serve all of them."""
SUPERSET_MOVING: Arm = arm_named("token-gram")
"""The same of the stage `moving`, whose packs keep the teacher's token maps too."""
NO_GRADIENT = "no gradient reaches a weight that trains; it needs a trunk that moves"


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. scale: factor on the arm's weights; None: found from the gradients, times `ratio`. tuned: changes of the
    training for `--stage tune`. digest: of what it does."""

    stage: str
    arm: str
    protocol: str
    fold: int
    seed: int
    ratio: float
    scale: float | None
    digest: str
    tuned: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> tuple[int, str]:
        return self.fold, self.protocol

    @property
    def reads(self) -> Arm:
        """The arm whose inputs the run's pack holds."""
        return SUPERSET_MOVING if self.stage == "moving" else SUPERSET


def job_of(
    stage: str, arm: Arm, protocol: str, fold: int, seed: int, ratio: float, scale: float | None, **tuned: Any
) -> Job:
    """With the digest of the recipe at this scale, or of the unscaled one and the ratio that decides the scale."""
    recipe = recipe_of(arm, protocol, fold, seed, ratio if scale is None else scale, tuned)
    return Job(stage, arm.name, protocol, fold, seed, ratio, scale, run_digest(recipe, seed, scale is None), tuned)


# --- what runs share


def start_folder(work: Path, seed: int) -> Path:
    return work / f"start-s{seed}-{text_digest(seed)}"


def pack_path(work: Path, fold: int, protocol: str, reads: Arm = SUPERSET) -> Path:
    recipe = recipe_of(reads, protocol, fold, 0)
    read = {part: recipe.to_dict()[part] for part in ("data", "views", "teacher", "student", "eval")}
    read["teacher"].pop("axes")  # a pack holds the teacher's own coordinates, whatever its runs turn them to
    facts = [read, text_digest(0), *asked_taps(recipe).teacher]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return work / f"pack-f{fold}-{protocol}-{key}.pt"


def make_start(work: Path, seed: int) -> None:
    """The student of a seed before any picture: pretrained image trunk, text tower trained on words."""
    folder = start_folder(work, seed)
    if (folder / "student.json").is_file():
        return
    torch.set_num_threads(1)
    run = work / f"text-s{seed}-{text_digest(seed)}"
    if not (run / "eval.json").is_file():
        distill_run(load_recipe(TEXT, text_changes(seed)), run, overwrite=True, progress=False)
    recipe = recipe_of(BASE, "few", 0, seed)
    recipe = started_at(recipe, str(run / "student"), str(run / "student" / "tokenizer.json"), "cpu")
    save_student(prepare(recipe, SILENT).student, folder, overwrite=True)


def make_pack(work: Path, fold: int, protocol: str, reads: Arm = SUPERSET) -> None:
    """Everything that the runs of a fold and protocol read, in one file."""
    path = pack_path(work, fold, protocol, reads)
    if path.is_file():
        return
    torch.set_num_threads(1)
    start = start_folder(work, 0)
    recipe = started_at(recipe_of(reads, protocol, fold, 0), str(start), str(start / "tokenizer.json"), "cpu")
    found = prepare(recipe, SILENT)
    for cache in (found.images, found.words):
        assert cache is not None, "the recipe that reads everything has a teacher and texts"
        cache.load()
    assert found.questions is not None, "the recipe has evaluation data"
    samples = [_in_memory(sample) for sample in found.samples]
    packed = dataclasses.replace(
        found,
        recipe=recipe_of(reads, protocol, fold, 0),
        source=DataSource(found.source.name, samples),
        held_out=None,
        samples=samples,
        questions=dataclasses.replace(found.questions, samples=tuple(map(_in_memory, found.questions.samples))),
        teacher_answers=None,
        student=None,  # type: ignore[arg-type]
        pictures=None,  # type: ignore[arg-type]
        report=None,  # type: ignore[arg-type]
        memo={},
    )
    torch.save({"prepared": packed, "policy": found.pictures.policy}, part := path.with_suffix(".part"))
    part.replace(path)


def teacher_row(work: Path, fold: int) -> dict[str, Any]:
    """What the teacher of a fold itself answers to the queries that its students get."""
    torch.set_num_threads(1)
    start = start_folder(work, 0)
    recipe = started_at(recipe_of(SUPERSET, "all", fold, 0), str(start), str(start / "tokenizer.json"), "cpu")
    found = prepare(recipe, SILENT)
    assert found.questions is not None, "the recipe has evaluation data"
    assert found.teacher_answers is not None, "the recipe has a teacher"
    queries = score(found.questions, found.teacher_answers, None, metrics_wanted=("retrieval",), tags=()).queries
    return {"fold": fold, "ranks": {d: queries[f"model/{d}/rank"].astype(int).tolist() for d in DIRECTIONS}}


def _in_memory(sample: Sample) -> Sample:
    return dataclasses.replace(sample, image=ImageRef(data=sample.image.read()))


def open_pack(work: Path, fold: int, protocol: str, reads: Arm = SUPERSET) -> Prepared:
    """What `make_pack` wrote, as `prepare` gave it; its student is the start of seed 0."""
    # the file is this benchmark's own, written by the command above
    content = torch.load(pack_path(work, fold, protocol, reads), weights_only=False)
    found: Prepared = content["prepared"]
    student = load_student(start_folder(work, 0))
    data, views = found.recipe.data, found.recipe.views
    pictures = Pictures(
        found.samples, student.image_spec, policy=content["policy"], seed=views.seed, source_px=data.source_px,
        budget=int(data.ram_gb * 2**30),
    )  # fmt: skip
    return dataclasses.replace(found, student=student, pictures=pictures, report=SILENT, memo={})


# --- one run


class Bench:
    """What a worker keeps between runs: one open pack, and students that are ready for the first step."""

    def __init__(self, work: Path, device: str) -> None:
        self.work, self.device = work, pick_device(device)
        self.group: tuple[int, str] | None = None
        self.prepared: Prepared | None = None
        self.starts: dict[tuple[Any, ...], Student] = {}

    def ready(self, job: Job, recipe: Recipe) -> Prepared:
        """Inputs of a run with a student of its own, its projections already where they start."""
        if self.group != job.group:
            opened = open_pack(self.work, job.fold, job.protocol, job.reads)
            self.prepared, self.group, self.starts = opened, job.group, {}
        assert self.prepared is not None, "a pack was opened"
        section = recipe.student
        taught = str(recipe.teacher) if section.fit_to == "teacher" else ""
        key = (job.seed, section.fit_projection, section.fit_to, section.fit_text_projection, taught)
        if key not in self.starts:
            student = load_student(start_folder(self.work, job.seed))
            student.space_id = None
            trainer = Trainer(self.prepared.with_recipe(recipe, student), self.device)
            trainer.start()
            self.starts[key] = trainer.student
        return self.prepared.with_recipe(recipe, copy.deepcopy(self.starts[key]))

    def run(self, job: Job) -> dict[str, Any]:
        """Train and score; the row that is kept. A run that diverges is a result too, the worst one. A loss that gives
        the student no gradient is not run but `skipped`: no weight would make it teach."""
        began = time.perf_counter()
        arm = arm_named(job.arm)
        recipe = recipe_of(arm, job.protocol, job.fold, job.seed, 1.0 if job.scale is None else job.scale, job.tuned)
        prepared = self.ready(job, recipe)
        scale, norms = job.scale, None
        if scale is None and arm.objectives:
            norms = gradient_norms(self._with_base(job, arm), self.device)
            if norms["own"]:
                scale = float(f"{job.ratio * norms['base'] / norms['own']:.3g}")
                recipe = recipe_of(arm, job.protocol, job.fold, job.seed, scale, job.tuned)
                prepared = dataclasses.replace(prepared, recipe=recipe)
        row: dict[str, Any] = dataclasses.asdict(job) | {
            "scale": scale,
            "norms": norms,
            "objectives": [spec.model_dump(mode="json", exclude_defaults=True) for spec in recipe.objectives],
            "device": describe_device(self.device),
        }
        if norms and not norms["own"]:
            return row | {"skipped": NO_GRADIENT}
        ready = time.perf_counter()
        try:
            found = train_and_score(prepared, self.device)
        except DivergedError as error:
            return row | {"diverged": str(error)}
        found["seconds"] = {"prepare": round(ready - began, 3), **found["seconds"]}
        return row | found

    def _with_base(self, job: Job, arm: Arm) -> Prepared:
        beside = dataclasses.replace(arm, replaces=False)
        recipe = recipe_of(beside, job.protocol, job.fold, job.seed, 1.0, job.tuned)
        return self.ready(job, recipe)


def gradient_norms(prepared: Prepared, device: torch.device) -> dict[str, float]:
    """Norm over all trained weights of the student of the first step's gradient: of the first objective ("base"), and
    of the weighted sum of the others ("own"), at the weights that their schedules rise or fall to from. 0 where nothing
    that trains is reached."""
    trainer = Trainer(prepared, device)
    optim.apply_freezing(trainer.student, trainer.config, 0)
    batch = trainer.feed.make(0)
    outputs, momentum = trainer.feed.forward(trainer.student, batch, trainer.beside), trainer._momentum(batch)
    parts: dict[str, list[Any]] = {"base": [], "own": []}
    for place, (spec, objective) in enumerate(zip(prepared.recipe.objectives, trainer.objectives)):
        student, teacher = outputs[spec.batch]
        terms = objective(student=student, teacher=momentum if objective.needs.momentum else teacher)
        parts["own" if place else "base"].append(spec.weight * sum(terms.values()))
    weights = [p for p in trainer.student.parameters() if p.requires_grad]
    norms = {}
    for part, losses in parts.items():
        slopes = torch.autograd.grad(sum(losses), weights, retain_graph=True, allow_unused=True)
        norms[part] = math.hypot(*(float(slope.norm()) for slope in slopes if slope is not None))
    return norms


def train_and_score(prepared: Prepared, device: torch.device) -> dict[str, Any]:
    """All steps from the student as it is, then the scores of its averaged weights, as `distill_run` does."""
    trainer = Trainer(prepared, device)
    steps, began = [], time.perf_counter()
    for batch in prefetch(trainer.feed.make, range(trainer.total)):
        before = time.perf_counter()
        trainer.one_step(batch)
        steps.append(time.perf_counter() - before)
    trained = time.perf_counter()
    with trainer.averaged():
        evaluation = trainer.evaluate()
    questions = prepared.questions
    assert evaluation is not None, "the recipe has evaluation data"
    assert questions is not None, "the recipe has evaluation data"
    queries = evaluation.queries
    asked = {
        "image_to_text": queries["image_to_text/uid"].tolist(),
        "text_to_image": queries["text_to_image/text"].tolist(),
    }
    groups = {sample.uid: sample.group for sample in questions.samples}
    concepts = {
        "image_to_text": [groups[uid] or uid for uid in asked["image_to_text"]],
        "text_to_image": [base_concept(text) for text in asked["text_to_image"]],
    }
    return {
        "final_loss": trainer.last.get("loss"),
        "logit_scale": round(trainer.last["logit_scale"], 3),
        "ranks": {d: queries[f"model/{d}/rank"].astype(int).tolist() for d in DIRECTIONS},
        "queries": hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16],
        "concepts": concepts,
        "seconds": {"train": round(trained - began, 3), "evaluate": round(time.perf_counter() - trained, 3)},
        "step_ms": round(1000 * float(np.median(steps)), 3),
    }


_BENCH: Bench | None = None


def enter(work: Path, device: str) -> None:
    """In a worker process, before its first run."""
    global _BENCH
    torch.set_num_threads(1)
    _BENCH = Bench(work, device)


def run_in_worker(job: Job) -> dict[str, Any]:
    assert _BENCH is not None, "the pool was made with `enter`"
    return _BENCH.run(job)
