"""The training loop: one visible loop from a recipe to a student.

Step n draws its pictures, views, captions and texts as a pure function of (seed, n), so the step number is the
loader's position. A checkpoint holds everything else that decides what comes next: weights, their average,
projectors, optimizer, loss scaler and random state. A run that is killed and resumed ends with the same loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pocketvlm.distill import optim
from pocketvlm.distill.accumulate import Parts, joined, parts_of
from pocketvlm.distill.balance import GradientBalance
from pocketvlm.distill.batches import Order, prefetch
from pocketvlm.distill.building import build_objectives, build_shares
from pocketvlm.distill.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    step_of,
    write_text_atomically,
)
from pocketvlm.distill.dropout import drawn_otherwise, key_by_sample
from pocketvlm.distill.encoders import scored
from pocketvlm.distill.environment import run_environment
from pocketvlm.distill.evaluate import Evaluation, embed_questions, score
from pocketvlm.distill.feed import Beside, Feed, Pair
from pocketvlm.distill.finish import RunResult, finish, scores
from pocketvlm.distill.fusion import fusion_of
from pocketvlm.distill.gather import gather_outputs, gather_step
from pocketvlm.distill.guards import DivergedError as DivergedError
from pocketvlm.distill.guards import RunStopped, StepGuard, StopSignals, locked
from pocketvlm.distill.meter import Meter
from pocketvlm.distill.objectives import Objective, Outputs
from pocketvlm.distill.objectives.blocks import shared_rows, similarity_bytes
from pocketvlm.distill.objectives.once import made_once
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.ranks import ALONE, Ranks, joined_ranks, restarted
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.recompute import blocks_of, checkpointed
from pocketvlm.distill.regions import frozen_copy
from pocketvlm.distill.run_folder import (
    CHECKPOINTS,
    ENVIRONMENT,
    METRICS,
    RECIPE,
    REPORT,
    STUDENT,
    MetricsLog,
    open_run_folder,
)
from pocketvlm.distill.state import restore, state_of
from pocketvlm.distill.step import Step
from pocketvlm.distill.stream_feed import StreamFeed
from pocketvlm.distill.trackers import check_trackers, open_log
from pocketvlm.edge.errors import PocketvlmError, UsageError, counted
from pocketvlm.teachers.device import describe_device, full_float32, pick_device


def distill_run(
    recipe: Recipe, out_dir: str | Path, *, resume: bool = False, overwrite: bool = False, progress: bool = True
) -> RunResult:
    """Train the recipe's student into `out_dir`, score it, and write the report.

    resume continues from the last checkpoint there; overwrite deletes an earlier run there first. Started by torchrun,
    it is one of the ranks of the run (`distill.ranks`), and where torchrun restarted it, it continues.

    Raises:
        UsageError: the folder or the recipe cannot be used. DivergedError: the loss is no longer a number.
        CheckpointWriteError: a full disk (the checkpoint before is intact). RankError: another rank ended. RunStopped:
        SIGTERM or SIGINT came while it trained (a checkpoint was saved).
    """
    out = Path(out_dir)
    threads = torch.get_num_threads()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    try:
        with joined_ranks(recipe.train.device) as ranks, full_float32(), ExitStack() as stack:
            # each node counts its own restarts: rank 0 may have none where another node's rank was lost
            (after_loss,) = ranks.any(restarted())
            again = resume or after_loss

            def opened() -> Path | None:
                stack.enter_context(locked(out))
                return open_run_folder(out, recipe, resume=again, overwrite=overwrite and not after_loss)

            start = ranks.from_first(opened)
            return _run(recipe, out, start, Reporter(progress and ranks.first), ranks, again)
    finally:
        torch.set_num_threads(threads)


def _run(recipe: Recipe, out: Path, checkpoint: Path | None, report: Reporter, ranks: Ranks, resume: bool) -> RunResult:
    if checkpoint is not None:
        # what is made ready before the first step takes a while
        total = recipe.train.text_pretrain_steps + recipe.train.steps
        report.line(
            f"resuming {out} after step {step_of(checkpoint):,} of {total:,}; making its data and teacher ready"
        )
    try:
        device = pick_device(recipe.train.device)
        check_trackers(recipe.train.trackers)
        with ranks.first_before_others():
            prepared = prepare(recipe, report)
            trainer = Trainer(prepared, device, ranks)
    except PocketvlmError:
        if checkpoint is None and ranks.first and not (out / ENVIRONMENT).exists():
            # nothing was made yet, and a corrected recipe shall not find the folder taken
            (out / RECIPE).unlink(missing_ok=True)
        raise
    if checkpoint is None:
        if ranks.first:
            write_text_atomically(out / ENVIRONMENT, run_environment(prepared, device, ranks.count))
        if resume:
            report.line(f"{out} holds no checkpoint yet, so the run starts")
        trainer.start()
    else:
        trainer.restore(load_checkpoint(checkpoint), checkpoint)
        report.line(f"continuing after step {trainer.step} from {checkpoint.name}")
    report.line(trainer.summary())
    if trainer.unkeyed:
        report.line(trainer.unkeyed)
    seconds = trainer.train(out, report)
    evaluation = finish(trainer, out, report) if ranks.first else None
    ranks.wait()
    return RunResult(
        folder=out,
        student=out / STUDENT,
        report=out / REPORT,
        evaluation=evaluation,
        final_loss=trainer.last.get("loss", math.nan),
        steps=trainer.total,
        seconds=seconds,
        licences=prepared.licences,
        rank=ranks.rank,
    )


class Trainer:
    """State of a run. step: steps done so far. total: steps of both phases. last: the row of the last step.

    unkeyed: what is drawn otherwise than by sample, where that makes a difference.
    """

    def __init__(self, prepared: Prepared, device: torch.device, ranks: Ranks = ALONE) -> None:
        recipe = prepared.recipe
        self.prepared, self.recipe, self.config, self.device, self.ranks = prepared, recipe, recipe.train, device, ranks
        torch.manual_seed(self.config.seed)
        self.student = prepared.student.to(device)
        if self.config.sync_batchnorm:
            self.student = ranks.synchronised(self.student, device)
        self.recomputed = blocks_of(self.student) if self.config.checkpoint_activations else []
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
        ranks.check_batches(self.order.batch_size, self.order.text_batch)
        self.feed = (Feed if prepared.stream is None else StreamFeed)(prepared, self.order, device, ranks)
        self.feed.keyed = key_by_sample(self.student)
        # before compiling, which would see a batch of its own
        self.unkeyed = drawn_otherwise(self.student) if self.feed.uniform else ""
        self.shares = build_shares(prepared)
        self.objectives: nn.ModuleList = build_objectives(prepared, self.shares).to(device)
        groups = optim.parameter_groups(self.student, self.objectives, self.config)
        # one pass over all parameters: on a CPU a tenth of the time of the loop over them
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, fused=fused)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.dtype = optim.autocast_dtype(self.config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type) if self.dtype is torch.float16 else None
        self.balance = GradientBalance(len(self.objectives)) if self.config.balance else None
        self.guard, self.signals, self.stopping = StepGuard(self.config, self.student), StopSignals(), False
        self._remember_start()
        if self.config.compile:
            self.student.image_tower.compile()
            self.student.text_tower.compile()
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
        self.ranks.share(self.student, self.objectives)
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
        size = sum(parameter.numel() for parameter in self.student.parameters())
        teacher = self.prepared.teacher.name if self.prepared.teacher else "no teacher"
        return (
            f"{self.student.config.name} ({size / 1e6:.2f} M parameters), {teacher}: {self.feed.data()}, "
            f"{counted(len(self.prepared.texts), 'text')}, {counted(self.total, 'step')} of "
            f"{counted(self.order.batch_size, 'picture')}, "
            f"{self._where()}, {str(self.dtype or torch.float32).removeprefix('torch.')}"
        )

    def _where(self) -> str:
        ranks = f"{self.ranks.count} x " if self.ranks.count > 1 else ""
        return ranks + describe_device(self.device)

    def train(self, out: Path, report: Reporter) -> float:
        """All remaining steps, with metrics, evaluations and checkpoints into `out`; returns the seconds taken."""
        self.guard.checkpoints = out / CHECKPOINTS
        log = open_log(out, self.recipe, self.step, report.line) if self.ranks.first else None
        elapsed = 0.0 if log is None else log.elapsed
        meter = Meter(self.total, self.step, elapsed=elapsed, cuda=self.device.type == "cuda")
        started = time.monotonic()
        batches = prefetch(self.feed.make, range(self.step, self.total))
        try:
            every = self.config.log_every
            with StopSignals() as self.signals, report.training(meter, every=every) as tell:
                while self.step < self.total:
                    before = time.monotonic()
                    batch = next(batches)
                    waited = time.monotonic() - before
                    row = self.one_step(batch)
                    taken = time.monotonic() - before
                    size = self.order.batch_size if batch.phase == "pairs" else self.order.text_batch
                    row |= meter.measure(row, samples=size, waited=waited, taken=taken)
                    due = self.step % every == 0 or self.step in (1, self.total) or "skipped_because" in row
                    if log is not None and due:
                        log.write(row)
                    self._sometimes(out, log, report)
                    tell(row)
        finally:
            if log is not None:
                log.close()
            batches.close()  # first, or a batch that was asked for would start the closed workers again
            self.feed.close()
        if self.guard.skipped:
            report.line(f"{self.guard.skipped} of {counted(self.total, 'step')} were skipped (see {METRICS})")
        return time.monotonic() - started

    def one_step(self, batch: Step) -> dict[str, Any]:
        """Forward, objectives, backward, update; returns the row of the log."""
        main = self.step - self.config.text_pretrain_steps
        optim.apply_freezing(self.student, self.config, max(main, 0))
        lr = self._set_learning_rate()
        for objective in self.objectives:
            cast(Objective, objective).at(self.step, optim.progress(main, self.config.steps))
        self.ranks.seed(self.config.seed, self.step)
        self.guard.remember()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._parts(batch)
        outputs = self._forward(batch) if parts is None else parts.outputs
        with similarity_bytes(int(self.config.similarity_mib * 2**20)), made_once(), shared_rows(*self.ranks.place):
            loss, terms = self._loss(outputs, batch, main)
        value = float(loss.detach())
        bad, self.stopping = self.ranks.any(not math.isfinite(value), self.signals.asked)
        if bad:
            return self._skip(batch, lr, "loss is not finite", {name: float(term) for name, term in terms.items()})
        if loss.requires_grad:
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            if parts is not None:
                parts.backward()
        self.ranks.average_gradients(self.parameters)
        norm, why_not = self._update()
        if why_not:
            return self._skip(batch, lr, why_not, {})
        self.ranks.average_statistics(self.student)
        self.guard.taken()
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
            "skipped": self.guard.skipped,
            **self._factors(),
        }
        return self.last

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def _skip(self, batch: Step, lr: float, what: str, terms: Mapping[str, float]) -> dict[str, Any]:
        """Nothing of this step stays but that it was."""
        told = self.guard.skip(self.step, what, terms)
        self.step += 1
        scale = float(self.student.logit_scale.detach())
        self.last = {"step": self.step, "phase": batch.phase, "lr": lr, "logit_scale": scale, **told}
        return self.last

    def _forward(self, batch: Step) -> dict[str, Pair]:
        try:
            with self._precision(), checkpointed(self.recomputed):
                return self.feed.forward(self.student, batch, self.beside)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"a rank's part of a step has {batch.size} picture and batch norm needs two or more; "
                "raise train.batch_size or train.micro_batch, or hold the statistics (train.hold_statistics)"
            ) from error

    def _parts(self, batch: Step) -> Parts | None:
        """The step in parts, run without a graph (`train.micro_batch`); None where it goes through at once."""
        parts = parts_of(batch, self.config.micro_batch)
        if len(parts) == 1:
            return None
        fixed = self.feed.bank is not None
        return Parts(parts, self._forward, self.student, fixed_bank=fixed, device=self.device)

    def _momentum(self, batch: Step) -> Outputs | None:
        """What the averaged student says to this batch's pictures and captions, of all ranks; None where none asks.

        Another forward of both towers: without a gradient, and in evaluation mode, so that it draws no random number.
        """
        asked = any(cast(Objective, objective).needs.momentum for objective in self.objectives)
        if not asked or batch.pixels is None:
            return None
        assert self.average is not None, "the recipe was checked to keep an average"
        with torch.no_grad(), self._precision():
            parts = parts_of(batch.pictures_and_captions(), self.config.micro_batch)
            found = [self.feed.forward(self.average.module, part, tapped=False) for part in parts]
        return gather_outputs(joined(found, fixed_bank=self.feed.bank is not None)["pairs"][0])

    def _loss(self, outputs: Any, batch: Step, main: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over objectives of their (balanced) weight times their terms, and each weighted term by name."""
        total = torch.zeros((), device=self.device)
        terms: dict[str, Tensor] = {}
        # in float32 and over the whole global batch, whatever precision and ranks the towers ran on
        gathered = gather_step(outputs, texts_are_bank=self.feed.bank is None)
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
                    self.balance.measure(place, sum(found.values(), torch.zeros_like(total)), student, self.ranks.mean)
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

    def _update(self) -> tuple[float, str]:
        """Clip and take the optimizer's step; (gradient norm, why the step was not taken or "").

        Under fp16 a gradient that is not finite lowers the loss scale, which is no fault of the run.
        """
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = float(optim.gradient_norm(self.parameters, self.config.clip_norm))
        finite = math.isfinite(norm)
        (steep,) = self.ranks.any(self.guard.too_steep(norm) and (finite or self.scaler is None))
        if steep:
            if self.scaler:
                self.scaler.update()
            above = f"{norm:.4g} is above train.skip_norm_above {self.config.skip_norm_above}"
            return norm, f"gradient norm {above if finite else 'is not finite'}"
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < 2.0**-10:
                raise self.guard.diverged(
                    f"the gradient is not finite at the lowest loss scale at step {self.step + 1}"
                )
        else:
            self.optimizer.step()
        return (norm if finite else 0.0), ""

    def _sometimes(self, out: Path, log: MetricsLog | None, report: Reporter) -> None:
        ends, every = self.step == self.total, self.recipe.eval.every
        evaluates = bool(every) and self.step % every == 0 and not ends and self.prepared.questions is not None
        # in a row of bad steps the weights are in doubt, and the checkpoint before stands
        sound = self.guard.in_a_row == 0
        saves = ends or (sound and (self.stopping or self.step % self.recipe.checkpoint.every == 0))
        if saves:
            self._check_weights()
            data = self.ranks.all_of(self.feed.state_dict(self.step))
        if log is not None and evaluates:
            with self.averaged():
                evaluation = self.evaluate()
            assert evaluation is not None
            row = scores(evaluation)
            log.write({"step": self.step, **row})
            shown = row.get("eval/image_to_text/R@5")
            if shown is not None:
                report.line(f"step {self.step}: image to text R@5 {100 * shown:.1f} %")
        if log is not None and saves:
            save_checkpoint(out / CHECKPOINTS, self.step, self.state(data), keep=self.recipe.checkpoint.keep)
        if evaluates or saves:
            self.ranks.wait()
        if self.stopping and not ends:
            after = latest_checkpoint(out / CHECKPOINTS)
            where = (
                f"saved {after.name}" if after is not None and saves else "kept its last checkpoint, if there is one"
            )
            message = (
                f"{self.signals.name or 'a signal to another rank'} stopped the run after step {self.step} of "
                f"{self.total}; it {where}: go on with the same command and --resume"
            )
            raise RunStopped(message if self.ranks.first else "")

    def _check_weights(self) -> None:
        modules: dict[str, nn.Module] = {"student": self.student, "objectives": self.objectives}
        if self.average is not None:
            modules["average"] = self.average.module
        self.guard.check_weights(self.step, **modules)
        self.ranks.check_equal(**modules)

    def averaged(self) -> Any:
        """The student as it is evaluated and saved inside the `with`: averaged, and interpolated with its start."""
        mixed = self.config.interpolate < 1
        if self.average is None and not mixed:
            return nullcontext()
        state = (self.student if self.average is None else self.average.module).state_dict()
        if mixed and self.beginning is not None:
            state = optim.interpolated(self.beginning, state, self.config.interpolate)
        return optim.replaced(self.student, state)

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

    def state(self, data: list[Any] | None = None) -> dict[str, Any]:
        """Everything that decides the next step; see `state.state_of`. data: of all ranks, where they are several."""
        return state_of(self, data or [self.feed.state_dict(self.step)])

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Continue from what `state` returned; see `state.restore`."""
        restore(self, state, path)
