"""The training loop: one visible loop from a recipe to a student.

Step n draws its pictures, views, captions and texts as a pure function of (seed, n), so the step number is the
loader's position. A checkpoint holds everything else that decides what comes next: weights, their average,
projectors, optimizer, loss scaler and random state. A run that is killed and resumed ends with the same loss.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketvlm.distill import optim
from pocketvlm.distill.balance import GradientBalance
from pocketvlm.distill.batches import Order, prefetch
from pocketvlm.distill.building import build_objectives, build_shares
from pocketvlm.distill.checkpoint import load_checkpoint, save_checkpoint, write_text_atomically
from pocketvlm.distill.encoders import scored
from pocketvlm.distill.environment import describe_environment
from pocketvlm.distill.evaluate import Evaluation, embed_questions, score
from pocketvlm.distill.feed import Beside, Feed, Step
from pocketvlm.distill.fusion import fusion_of
from pocketvlm.distill.gather import gather_outputs
from pocketvlm.distill.meter import Meter
from pocketvlm.distill.objectives import Objective, Outputs
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.regions import frozen_copy
from pocketvlm.distill.run_folder import (
    CHECKPOINTS,
    ENVIRONMENT,
    RECIPE,
    REPORT,
    STUDENT,
    MetricsLog,
    open_run_folder,
)
from pocketvlm.distill.trackers import check_trackers, open_log
from pocketvlm.edge.errors import IntegrityError, PocketvlmError
from pocketvlm.students import save_student
from pocketvlm.students.task import SHARES, choose_mixing
from pocketvlm.teachers.device import describe_device, full_float32, pick_device

CHECKPOINT_SCHEMA = 2


class DivergedError(PocketvlmError, ArithmeticError):
    """A loss or gradient stopped being a number; the checkpoints written before are good."""


@dataclass(frozen=True)
class RunResult:
    """A finished run. final_loss: of the last step. seconds: spent in steps by this process.
    licences: (what, licence, attribution) of data, teacher and initial weights."""

    folder: Path
    student: Path
    report: Path
    evaluation: Evaluation | None
    final_loss: float
    steps: int
    seconds: float
    licences: tuple[tuple[str, str, str], ...] = ()


def distill_run(
    recipe: Recipe, out_dir: str | Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> RunResult:
    """Train the recipe's student into `out_dir`, score it, and write the report.

    resume continues from the last checkpoint there; overwrite deletes an earlier run there first.

    Raises:
        UsageError: the folder or the recipe cannot be used. DivergedError: the loss is no longer a number.
        CheckpointWriteError: a full disk (the previous checkpoint is intact).
    """
    out = Path(out_dir)
    checkpoint = open_run_folder(out, recipe, resume=resume, overwrite=overwrite)
    threads = torch.get_num_threads()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    try:
        with full_float32():
            return _run(recipe, out, checkpoint, Reporter(progress), resume)
    finally:
        torch.set_num_threads(threads)


def _run(recipe: Recipe, out: Path, checkpoint: Path | None, report: Reporter, resume: bool) -> RunResult:
    try:
        device = pick_device(recipe.train.device)
        check_trackers(recipe.train.trackers)
        prepared = prepare(recipe, report)
    except PocketvlmError:
        if checkpoint is None and not resume:
            # nothing was made yet, and a corrected recipe shall not find the folder taken
            (out / RECIPE).unlink(missing_ok=True)
            with suppress(OSError):
                out.rmdir()
        raise
    if checkpoint is None:
        write_text_atomically(out / ENVIRONMENT, _environment(prepared, device))
    trainer = Trainer(prepared, device)
    if checkpoint is None:
        trainer.start()
    else:
        trainer.restore(load_checkpoint(checkpoint), checkpoint)
        report.line(f"continuing after step {trainer.step} from {checkpoint.name}")
    report.line(trainer.summary())
    seconds = trainer.train(out, report)
    with trainer.averaged():
        if prepared.task is not None:
            report.line(trainer.mix_heads())
        save_student(trainer.student, out / STUDENT, overwrite=True)
        evaluation = trainer.evaluate()
    if evaluation is not None:
        evaluation.save(out)
        log = open_log(out, recipe, trainer.step, report.line)
        log.write({"step": trainer.step, "final": True, **_scores(evaluation)})
        log.close()
    from pocketvlm.distill.report import write_report

    write_report(out, prepared.questions, evaluation, licences=prepared.licences)
    return RunResult(
        folder=out,
        student=out / STUDENT,
        report=out / REPORT,
        evaluation=evaluation,
        final_loss=trainer.last.get("loss", math.nan),
        steps=trainer.total,
        seconds=seconds,
        licences=prepared.licences,
    )


def _environment(prepared: Prepared, device: torch.device) -> str:
    recipe, teacher = prepared.recipe, prepared.teacher
    facts = describe_environment(
        recipe_sha256=recipe.digest(),
        device=describe_device(device),
        data={
            "train": prepared.source.summary(),
            "eval": prepared.held_out.summary() if prepared.held_out else None,
            "text_pool": len(prepared.texts),
        },
        teacher={"name": teacher.name, "fingerprint": teacher.fingerprint, "dim": teacher.dim} if teacher else None,
        licences=[list(row) for row in prepared.licences],
    )
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"


class Trainer:
    """State of a run. step: steps done so far. total: steps of both phases. last: the row of the last step."""

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        recipe = prepared.recipe
        self.prepared, self.recipe, self.config, self.device = prepared, recipe, recipe.train, device
        torch.manual_seed(self.config.seed)
        self.student = prepared.student.to(device)
        self.order = Order(
            prepared.samples,
            batch_size=self.config.batch_size,
            views=recipe.views.count,
            seed=self.config.seed,
            captioned_fraction=self.config.captioned_fraction,
            text_pool=len(prepared.texts),
            text_batch=self.config.text_batch,
            marked=None if prepared.task is None else [label >= 0 for label in prepared.task.train],
        )
        self.feed = Feed(prepared, self.order, device)
        self.shares = build_shares(prepared)
        self.objectives: nn.ModuleList = build_objectives(prepared, self.shares).to(device)
        groups = optim.parameter_groups(self.student, self.objectives, self.config)
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.dtype = optim.autocast_dtype(self.config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype is torch.float16 else None
        self.balance = GradientBalance(len(self.objectives)) if self.config.balance else None
        self._remember_start()
        self.step = 0
        self.total = self.config.text_pretrain_steps + self.config.steps
        self.last: dict[str, Any] = {}

    def start(self) -> None:
        """What happens once, before the first step of a fresh run."""
        section = self.recipe.student
        if section.fit_text_projection is not None:
            self.feed.fit_text_projection(self.student)
        if section.fit_projection is not None:
            self.feed.fit_projection(self.student)
        self._remember_start()

    def _remember_start(self) -> None:
        """The average begins here, and this is the start that the result may be interpolated with, or learn from."""
        self.average = optim.Average(self.student, self.config.ema_decay) if self.config.ema_decay else None
        original = frozen_copy(self.student.image_tower) if self.feed.regions is not None else None
        self.beside = Beside(fusion_of(self.objectives), original)
        kept = self.config.interpolate < 1 or original is not None
        self.beginning = optim.snapshot(self.student) if kept else None

    def summary(self) -> str:
        """One line for people: what is trained, on what, for how long."""
        pictures = self.prepared.samples
        captioned = sum(bool(sample.captions) for sample in pictures)
        size = sum(parameter.numel() for parameter in self.student.parameters())
        teacher = self.prepared.teacher.name if self.prepared.teacher else "no teacher"
        return (
            f"{self.student.config.name} ({size / 1e6:.2f} M parameters), {teacher}: {len(pictures)} pictures "
            f"({captioned} with captions), {len(self.prepared.texts)} texts, {self.total} steps of "
            f"{self.order.batch_size} pictures, {describe_device(self.device)}, "
            f"{str(self.dtype or torch.float32).removeprefix('torch.')}"
        )

    def train(self, out: Path, report: Reporter) -> float:
        """All remaining steps, with metrics, evaluations and checkpoints into `out`; returns the seconds taken."""
        log = open_log(out, self.recipe, self.step, report.line)
        meter = Meter(self.total, self.step, elapsed=log.elapsed, cuda=self.device.type == "cuda")
        started = time.monotonic()
        try:
            batches = prefetch(self.feed.make, range(self.step, self.total))
            every = self.config.log_every
            with report.training(meter, every=every) as tell:
                while self.step < self.total:
                    before = time.monotonic()
                    batch = next(batches)
                    waited = time.monotonic() - before
                    row = self.one_step(batch)
                    taken = time.monotonic() - before
                    row |= meter.measure(row, samples=batch.size, waited=waited, taken=taken)
                    if self.step % every == 0 or self.step in (1, self.total):
                        log.write(row)
                    self._sometimes(out, log, report)
                    tell(row)
        finally:
            log.close()
        return time.monotonic() - started

    def one_step(self, batch: Step) -> dict[str, Any]:
        """Forward, objectives, backward, update; returns the row of the log."""
        main = self.step - self.config.text_pretrain_steps
        optim.apply_freezing(self.student, self.config, max(main, 0))
        lr = self._set_learning_rate()
        for objective in self.objectives:
            cast(Objective, objective).at(self.step, optim.progress(main, self.config.steps))
        with self._precision():
            outputs = self.feed.forward(self.student, batch, self.beside)
        loss, terms = self._loss(outputs, batch, main)
        if not math.isfinite(value := float(loss.detach())):
            self._diverged("loss", {name: float(term) for name, term in terms.items()})
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        norm = self._update()
        self.student.clamp_logit_scale_()
        if self.average is not None:
            self.average.update(self.student)
            every = self.config.switch_every
            if every and main >= 0 and (main + 1) % every == 0:
                optim.switch(self.student, self.average.module, self.config, main)
        self.step += 1
        self.last = {
            "step": self.step,
            "phase": batch.phase,
            "loss": value,
            **{f"loss/{name}": float(term) for name, term in terms.items()},
            "lr": lr,
            "grad_norm": norm,
            "logit_scale": float(self.student.logit_scale.detach()),
            **self._factors(),
        }
        return self.last

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def _momentum(self, batch: Step) -> Outputs | None:
        """What the averaged student says to this batch's pictures and captions, of all ranks; None where none asks.

        Another forward of both towers: without a gradient, and in evaluation mode, so that it draws no random number.
        """
        asked = any(cast(Objective, objective).needs.momentum for objective in self.objectives)
        if not asked or batch.pixels is None:
            return None
        assert self.average is not None, "the recipe was checked to keep an average"
        with torch.no_grad(), self._precision():
            only = batch.pictures_and_captions()
            student, _ = self.feed.forward(self.average.module, only, tapped=False)["pairs"]
        return gather_outputs(student)

    def _loss(self, outputs: Any, batch: Step, main: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over objectives of their (balanced) weight times their terms, and each weighted term by name."""
        total = torch.zeros((), device=self.device)
        terms: dict[str, Tensor] = {}
        # in float32 and over the whole global batch, whatever precision and ranks the towers ran on
        gathered = {
            side: (gather_outputs(student), None if teacher is None else gather_outputs(teacher))
            for side, (student, teacher) in outputs.items()
        }
        momentum = self._momentum(batch)
        for place, (spec, objective) in enumerate(zip(self.recipe.objectives, self.objectives)):
            if spec.batch not in gathered:
                continue
            student, teacher = gathered[spec.batch]
            if teacher is not None and (share := self.shares[place]) is not None:
                teacher = share(teacher)
            if cast(Objective, objective).needs.momentum:
                teacher = momentum
            found = objective(student=student, teacher=teacher)
            weight = optim.objective_weight(spec, max(main, 0), self.config.steps)
            if self.balance is not None:
                if main >= 0 and main % self.config.balance_every == 0:
                    self.balance.measure(place, sum(found.values(), torch.zeros_like(total)), student)
                weight *= self.balance.factor(place)
            for name, term in found.items():
                total = total + weight * term
                label = name if spec.batch == "pairs" else f"{name}@texts"
                terms[label if label not in terms else f"{label}#{place}"] = weight * term.detach()
        return total, terms

    def _factors(self) -> dict[str, float]:
        if self.balance is None:
            return {}
        specs = enumerate(self.recipe.objectives)
        return {f"balance/{place}.{spec.name}": self.balance.factor(place) for place, spec in specs}

    def _set_learning_rate(self) -> float:
        pretrain = self.config.text_pretrain_steps
        if self.step < pretrain:
            lr = optim.learning_rate(self.step, pretrain, self.config)
        else:
            lr = optim.learning_rate(self.step - pretrain, self.config.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        return lr

    def _update(self) -> float:
        """Clip and take the optimizer's step; a non-finite gradient stops the run (with fp16: lowers the scale)."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = float(optim.gradient_norm(self.parameters, self.config.clip_norm))
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < 2.0**-10:
                self._diverged("gradient at the lowest loss scale", {})
        else:
            if not math.isfinite(norm):
                self._diverged("gradient norm", {})
            self.optimizer.step()
        return norm if math.isfinite(norm) else 0.0

    def _diverged(self, what: str, terms: Mapping[str, float]) -> None:
        bad = [name for name, value in terms.items() if not math.isfinite(value)]
        where = f" (in {', '.join(bad)})" if bad else ""
        raise DivergedError(
            f"the {what} is not finite at step {self.step + 1}{where}, so every later step would be noise; lower "
            "train.lr, raise train.warmup_steps or use train.precision fp32, and start again (earlier checkpoints are "
            "intact)"
        )

    def _sometimes(self, out: Path, log: MetricsLog, report: Reporter) -> None:
        ends = self.step == self.total
        every = self.recipe.eval.every
        if every and self.step % every == 0 and not ends and self.prepared.questions is not None:
            with self.averaged():
                evaluation = self.evaluate()
            assert evaluation is not None
            row = _scores(evaluation)
            log.write({"step": self.step, **row})
            shown = row.get("eval/image_to_text/R@5")
            if shown is not None:
                report.line(f"step {self.step}: image to text R@5 {100 * shown:.1f} %")
        if ends or self.step % self.recipe.checkpoint.every == 0:
            save_checkpoint(out / CHECKPOINTS, self.step, self.state(), keep=self.recipe.checkpoint.keep)

    def averaged(self) -> Any:
        """The student as it is evaluated and saved inside the `with`: averaged, and interpolated with its start."""
        mixed = self.config.interpolate < 1
        if self.average is None and not mixed:
            return nullcontext()
        state = (self.student if self.average is None else self.average.module).state_dict()
        if mixed and self.beginning is not None:
            state = optim.interpolated(self.beginning, state, self.config.interpolate)
        return optim.replaced(self.student, state)

    def mix_heads(self) -> str:
        """Set how the student's two heads are mixed, by the recipe or by the held-out labels; says what was done."""
        task, heads, section = self.prepared.task, self.student.heads, self.recipe.task
        assert task is not None, "only a recipe with a task comes here"
        assert heads is not None, "only a recipe with a task comes here"
        assert section is not None, "only a recipe with a task comes here"
        rows = [row for row, label in enumerate(task.held) if label >= 0]
        share, temperature = float(heads.share), float(heads.temperature)
        if rows and (section.share is None or section.temperature is None):
            label = torch.tensor([task.held[row] for row in rows])
            shares = SHARES if section.share is None else (section.share,)
            share, temperature = choose_mixing(*self.feed.class_logits(self.student, rows), label, section.mix, shares)
        heads.share.fill_(share if section.share is None else section.share)
        heads.temperature.fill_(temperature if section.temperature is None else section.temperature)
        return (
            f"classifier: {float(heads.share):.2f} of the taught head at temperature {float(heads.temperature):g}, "
            f"mixed by {section.mix}, {len(rows)} labels held out for the choice"
        )

    def evaluate(self) -> Evaluation | None:
        """Score the student as it stands; None without evaluation data."""
        questions = self.prepared.questions
        if questions is None:
            return None
        settings = self.recipe.eval
        own = embed_questions(
            scored(self.student, device=self.device),
            questions,
            name=self.student.config.name,
            batch_size=settings.batch_size,
        )
        return score(questions, own, self.prepared.teacher_answers, metrics_wanted=settings.metrics, tags=settings.tags)

    def state(self) -> dict[str, Any]:
        """Everything that decides the next step, as tensors and plain values."""
        return {
            "schema": CHECKPOINT_SCHEMA,
            "recipe": self.recipe.digest(),
            "inputs": self.prepared.digest,
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "start": self.beginning,
            "balance": self.balance.state_dict() if self.balance is not None else None,
            "objectives": self.objectives.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "rng": optim.rng_state(),
            "last": self.last,
        }

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Continue from what `state` returned.

        Raises:
            IntegrityError: it was made by another release, recipe, data, tokenizer or teacher.
        """
        if state.get("schema") != CHECKPOINT_SCHEMA:
            raise IntegrityError(
                f"checkpoint {path} has schema {state.get('schema')} and this release writes and reads "
                f"{CHECKPOINT_SCHEMA}, so it cannot be continued here; finish that run with the release that began it, "
                "or start anew with --overwrite"
            )
        for key, own in (("recipe", self.recipe.digest()), ("inputs", self.prepared.digest)):
            if state[key] != own:
                what = {"recipe": "recipe", "inputs": "data, texts, tokenizer or teacher"}[key]
                raise IntegrityError(
                    f"checkpoint {path} was made with another {what}, so continuing would mix two runs; restore what "
                    "it was made with, or start anew with --overwrite"
                )
        self.student.load_state_dict(state["student"])
        self.objectives.load_state_dict(state["objectives"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.beginning is not None:
            self.beginning = {name: value.to(self.device) for name, value in state["start"].items()}
            if self.beside.original is not None:
                parts = [(k.removeprefix("image_tower."), k) for k in self.beginning if k.startswith("image_tower.")]
                self.beside.original.load_state_dict({part: self.beginning[name] for part, name in parts})
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        optim.set_rng_state(state["rng"])
        self.step, self.last = int(state["step"]), dict(state["last"])


def _scores(evaluation: Evaluation) -> dict[str, float]:
    """The shares of an evaluation as one flat row of metrics.jsonl."""
    own = evaluation.values["model"]
    return {f"eval/{part}/{key}": own[part][key] for part in own for key in own[part] if "@" in key or "top" in key}
