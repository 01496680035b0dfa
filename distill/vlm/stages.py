"""Training a generative student in the stages of a recipe, from labels and from what a teacher said once.

What a step sees depends on the recipe, its seed and the step's number alone, so a run that was killed goes on to the
numbers it would have had: a checkpoint holds weights, optimizer and step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.data.scenes import scene_rng
from pocketvlm.distill.checkpoint import (
    SCHEMA,
    check_origin,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_text_atomically,
)
from pocketvlm.distill.vlm.answer_cache import KeptAnswers, Taught, check_vocabulary, model_digest
from pocketvlm.distill.vlm.batches import Composer
from pocketvlm.distill.vlm.features import Features, KeptTrunk
from pocketvlm.distill.vlm.losses import kept_divergence, relation_distance, token_divergence
from pocketvlm.distill.vlm.on_policy import sampled_rows
from pocketvlm.distill.vlm.recipe import StageSection, VlmRecipe, WeightsSection
from pocketvlm.distill.vlm.scene_list import SceneList
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.connectors import Fusion
from pocketvlm.students.vlm.model import Rows, Vlm

HISTORY = "history.json"
_CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Source:
    """A list of scenes, and how the student sees them: kept trunk outputs, or pixels of a composer (vision moves).

    answers: what the teacher said of it, or None.
    """

    scenes: SceneList
    features: Features | None = None
    composer: Composer | None = None
    answers: KeptAnswers | None = None

    def seen(self, chosen: Sequence[int]) -> Tensor:
        """Kept features, on the CPU, or pixels, on the composer's device."""
        if self.features is not None:
            return self.features(chosen)
        if self.composer is None:
            raise UsageError("a list of scenes has neither kept features nor a composer; give one of them")
        return self.scenes.pixels(chosen, self.composer)


@dataclasses.dataclass(frozen=True)
class Live:
    """A teacher at hand, for on-policy steps, with the composer of its pictures for the taught list."""

    teacher: Vlm
    composer: Composer


def chosen_scenes(count: int, share: int, step: int, seed: int, what: str) -> list[int]:
    """`share` numbers below `count` for this step: each epoch is a permutation, drawn from (seed, what, epoch)."""
    found: list[int] = []
    place = step * share
    while len(found) < share:
        epoch, start = divmod(place, count)
        order = list(range(count))
        random.Random(f"{seed}/{what}/{epoch}").shuffle(order)
        part = order[start : start + share - len(found)]
        found += part
        place += len(part)
    return found


def stage_terms(
    model: Vlm, weights: WeightsSection, seen: Tensor, rows: Rows, taught: Taught | None
) -> dict[str, Tensor]:
    """The terms of a stage's loss that have a weight, unweighted, each a scalar.

    seen, rows: the batch, pictures with the teacher's answers first; taught: what was kept of those, or None.
    """
    hidden, text = model.hidden(seen, rows), rows.ids.shape[1]
    # from the end: a connector or a reduction may give another number of visual tokens than `prefix` counts
    logits = model.decoder.logits(hidden[:, -text:].flatten(0, 1)[rows.places])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = {"answer": F.cross_entropy(logits, rows.targets)} if weights.answer else {}
    if taught is None:
        return terms
    if weights.response:
        terms["response"] = kept_divergence(
            student=logits[: len(taught.ids)], ids=taught.ids, logs=taught.logs, direction=weights.direction
        )
    if weights.visual:
        if taught.place_ids is None or taught.place_logs is None:
            raise UsageError(
                "weights.visual was given, but the teacher's answers were kept without the picture's places; keep them "
                "again with teacher.places=true"
            )
        places = _as_many(hidden[: len(taught.place_ids), 1:-text], taught.place_ids).flatten(0, 1)
        terms["visual"] = kept_divergence(
            student=model.decoder.logits(places),
            ids=taught.place_ids.flatten(0, 1),
            logs=taught.place_logs.flatten(0, 1),
            direction=weights.direction,
        )
    if weights.relation:
        if taught.relations is None:
            raise UsageError(
                "weights.relation was given, but the teacher's answers were kept without relations of its visual "
                "tokens; give the teacher itself, or set it to 0"
            )
        own = _as_many(hidden[: len(taught.relations), 1:-text], taught.relations)
        terms["relation"] = relation_distance(student=own, teacher=taught.relations)
    return terms


def _as_many(own: Tensor, theirs: Tensor) -> Tensor:
    if own.shape[1] != theirs.shape[1]:
        raise UsageError(
            f"the student has {own.shape[1]} visual tokens and {theirs.shape[1]} of the teacher's were kept, so place "
            "i of one is another place of the other; set weights.visual and weights.relation to 0"
        )
    return own


def _on_policy_terms(
    model: Vlm, stage: StageSection, live: Live, taught: Source, chosen: Sequence[int], seen: Tensor, seed: int
) -> dict[str, Tensor]:
    """The student answers the questions of these scenes, and the teacher's distribution at its tokens is the target."""
    rows = sampled_rows(
        model, seen, [entry.talks for entry in (taught.scenes.entries[i] for i in chosen)],
        temperature=stage.temperature, seed=seed,
    ).to(model.device)  # fmt: skip
    own = model.hidden(seen, rows)[:, -rows.ids.shape[1] :].flatten(0, 1)[rows.places]
    with torch.no_grad():
        logits = live.teacher(taught.scenes.pixels(chosen, live.composer).to(rows.ids.device), rows)
    found = token_divergence(student=model.decoder.logits(own), teacher=logits, direction=stage.weights.direction)
    return {"on_policy": found}


class StageRun:
    """One run of a recipe on one student; `run` trains it in place."""

    def __init__(
        self,
        model: Vlm,
        recipe: VlmRecipe,
        labelled: Source,
        taught: Source | None,
        folder: Path,
        *,
        live: Live | None = None,
        say: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """Raises:
        UsageError: a stage needs scenes, answers or a teacher that are not there, or a teacher of other tokens."""
        self.model, self.recipe, self.folder, self.say = model, recipe, folder, say
        self.labelled, self.taught, self.live = labelled, taught, live
        for stage in recipe.stages:
            self._check(stage)
        if live is not None:
            check_vocabulary(live.teacher, model.tokenizer.json)
            live.teacher.eval().requires_grad_(False)
        self.history: list[dict[str, Any]] = []
        self._sums: dict[str, list[float]] = {}

    def _check(self, stage: StageSection) -> None:
        if stage.heard and self.taught is None:
            raise UsageError(
                f"stage {stage.name!r} takes {1 - stage.labelled:.0%} of its scenes from those a teacher answered, and "
                "no teacher is given; name one, or set labelled to 1"
            )
        if stage.weights.hears and (self.taught is None or self.taught.answers is None):
            raise UsageError(
                f"stage {stage.name!r} gives weights to what the teacher said, and no answers of it were kept; keep "
                "them with kept_answers, or set response, visual and relation to 0"
            )
        if stage.on_policy and (self.model.reduction is not None or isinstance(self.model.connector, Fusion)):
            raise UsageError(
                f"stage {stage.name!r} lets the student answer, and this student leaves visual tokens out or fuses "
                "them with the question, which the sampler does not; set on_policy to 0"
            )
        if stage.on_policy and self.live is None:
            raise UsageError(
                f"stage {stage.name!r} lets the teacher judge the student's own answers, and only kept answers are "
                "given; give the teacher itself, or set on_policy to 0"
            )
        if "vision" in stage.train and isinstance(self.model.vision, KeptTrunk):
            raise UsageError(
                f"stage {stage.name!r} trains the vision trunk, whose outputs were kept instead of it; give sources "
                "with composers, or take vision out of train"
            )

    @cached_property
    def inputs(self) -> str:
        """sha256 of lists of scenes, student, tokenizer and live teacher: what a checkpoint must be made with."""
        parts = [self.labelled.scenes.digest, "" if self.taught is None else self.taught.scenes.digest]
        parts.append(hashlib.sha256(self.model.tokenizer.json).hexdigest())
        # with the id of a CLIP student whose tower it has
        parts.append(self.model.config.model_dump_json())
        parts.append("" if self.live is None else model_digest(self.live.teacher))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self, *, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the end, from the newest checkpoint where `resume` is set and there is one. Returns the history:
        every `log_every` steps stage, step, seconds, steps a second and the means of the terms since the last row.

        Raises:
            UsageError: checkpoints are there and `resume` is not set, or the loss is no number any more.
            IntegrityError: the checkpoint is damaged or of another recipe or other inputs.
        """
        store = self.folder / _CHECKPOINTS
        newest = latest_checkpoint(store)
        state: dict[str, Any] | None = None
        if newest is not None:
            if not resume:
                raise UsageError(
                    f"folder {str(self.folder)!r} holds checkpoints of a run, which would be mixed with this one's; "
                    "resume it, or choose another folder"
                )
            state = load_checkpoint(newest)
            check_origin(state, newest, recipe=self.recipe.digest(), inputs=self.inputs)
            self.model.load_state_dict(state["model"])
            self.history = json.loads(state["history"])
            self._sums = state["sums"]
        done = 0 if state is None else int(state["step"])
        first = 0
        for stage in self.recipe.stages:
            if done < first + stage.steps:
                resumed = state["optimizer"] if state is not None and done > first else None
                self._stage(stage, first, done - first if done > first else 0, resumed)
            first += stage.steps
        self.model.requires_grad_(True)
        self.model.eval()
        return self.history

    def _stage(self, stage: StageSection, first: int, start: int, optimizer_state: dict[str, Any] | None) -> None:
        recipe, model, optim = self.recipe, self.model, self.recipe.optim
        model.train()
        for name, part in (("connector", model.connector), ("decoder", model.decoder), ("vision", model.vision)):
            part.requires_grad_(name in stage.train)
        # statistics of the pictures it was trained on stay, as in `train_vlm`
        model.vision.eval()
        optimizer = _optimizer(model, stage, optim.weight_decay)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
        base = [group["lr"] if optimizer_state is None else group["base"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, base):
            group["base"] = rate
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        known = {} if optimizer_state is None else self._sums
        # a device is waited for only where numbers are shown or saved
        sums: dict[str, list[Tensor]] = {
            name: list(torch.tensor(each, device=model.device).unbind()) for name, each in known.items()
        }
        since, counted = time.monotonic(), 0
        for step in range(start, stage.steps):
            warm = min(1.0, (step + 1) / max(stage.warmup, 1))
            factor = warm * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
            for group, rate in zip(optimizer.param_groups, base):
                group["lr"] = rate * factor
            if len(model.connector.sizes) > 1:
                # a number of visual tokens is drawn from it (`Vlm.hidden`)
                torch.manual_seed(scene_rng(optim.seed, first + step, "connector").randrange(2**62))
            loss, terms = self._loss(stage, first + step, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if optim.clip:
                nn.utils.clip_grad_norm_(weights, optim.clip)
            optimizer.step()
            for name, value in terms.items():
                sums.setdefault(name, []).append(value.detach().float())
            counted += 1
            done = step + 1
            if done % optim.log_every == 0 or done == stage.steps:
                now = time.monotonic()
                row = {"stage": stage.name, "step": first + done, "steps_per_second": round(counted / (now - since), 2)}
                said = _floats(sums)
                row |= {name: round(sum(values) / len(values), 4) for name, values in said.items()}
                if not math.isfinite(sum(sum(values) for values in said.values())):
                    raise UsageError(
                        f"a term of the loss is no number in stage {stage.name!r} at step {first + done} ({row}), so "
                        "nothing more is learnt; lower the rate"
                    )
                self.history.append(row)
                self.say(row)
                sums, since, counted = {}, now, 0
            if done % optim.every == 0 or done == stage.steps:
                self._save(first + done, optimizer, done == stage.steps, _floats(sums))
        if recipe.stages[-1] is stage:
            write_text_atomically(self.folder / HISTORY, json.dumps(self.history, indent=1) + "\n")

    def _save(self, step: int, optimizer: torch.optim.Optimizer, ended: bool, sums: dict[str, list[float]]) -> None:
        state = {
            "schema": SCHEMA,
            "recipe": self.recipe.digest(),
            "inputs": self.inputs,
            "step": step,
            "model": self.model.state_dict(),
            # the next stage has an optimizer of its own
            "optimizer": None if ended else optimizer.state_dict(),
            "history": json.dumps(self.history),
            "sums": sums,
        }
        save_checkpoint(self.folder / _CHECKPOINTS, step, state, keep=1)

    def _loss(self, stage: StageSection, step: int, own_step: int) -> tuple[Tensor, dict[str, Tensor]]:
        recipe, seed, device = self.recipe, self.recipe.optim.seed, self.model.device
        heard = stage.heard
        true = stage.batch - heard
        weights = stage.weights
        seen: list[Tensor] = []
        lists: list[tuple[SceneList, list[int]]] = []
        taught = None
        if heard:
            assert self.taught is not None, "checked when the run was made"
            chosen = chosen_scenes(len(self.taught.scenes), heard, own_step, seed, f"{stage.name}/taught")
            shown = self.taught.seen(chosen).to(device)
            draw = scene_rng(seed, step, "on-policy")
            if stage.on_policy and draw.random() < stage.on_policy:
                assert self.live is not None, "checked when the run was made"
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.optim.bfloat16):
                    terms = _on_policy_terms(
                        self.model, stage, self.live, self.taught, chosen, shown, draw.randrange(2**62)
                    )
                    loss = weights.response * terms["on_policy"]
                    if true:
                        places = chosen_scenes(len(self.labelled.scenes), true, own_step, seed, f"{stage.name}/true")
                        rows = self.labelled.scenes.rows(places).to(device)
                        terms |= stage_terms(self.model, weights, self.labelled.seen(places).to(device), rows, None)
                        loss = loss + weights.answer * terms.get("answer", loss.new_zeros(()))
                return loss, terms
            seen.append(shown)
            lists.append((self.taught.scenes, chosen))
            if weights.hears:
                assert self.taught.answers is not None, "checked when the run was made"
                taught = self.taught.answers.of(chosen).to(device)
        if true:
            places = chosen_scenes(len(self.labelled.scenes), true, own_step, seed, f"{stage.name}/true")
            seen.append(self.labelled.seen(places).to(device))
            lists.append((self.labelled.scenes, places))
        # outside of autocast, which knows no float16 on a CPU
        batch = torch.cat(seen)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.optim.bfloat16):
            terms = stage_terms(self.model, weights, batch, joined_rows(lists).to(device), taught)
        zero = torch.zeros((), device=device)
        total = sum((getattr(weights, name) * value for name, value in terms.items()), zero)
        return total, terms


def _floats(sums: Mapping[str, Sequence[Tensor]]) -> dict[str, list[float]]:
    return {name: torch.stack(list(values)).tolist() for name, values in sums.items() if values}


def joined_rows(lists: Sequence[tuple[SceneList, Sequence[int]]]) -> Rows:
    """`SceneList.rows` of several lists below each other, the shorter ones padded."""
    parts = [scenes.rows(chosen) for scenes, chosen in lists]
    width = max(part.ids.shape[1] for part in parts)
    padded, places, before = [], [], 0
    for part in parts:
        count, length = part.ids.shape
        fill = (0, width - length)
        padded.append(
            (F.pad(part.ids, fill), F.pad(part.turns, fill, value=-1), F.pad(part.positions, fill), part.targets)
        )
        row = torch.div(part.places, length, rounding_mode="floor")
        places.append((before + row) * width + part.places % length)
        before += count
    ids, turns, positions, targets = (torch.cat(group) for group in zip(*padded))
    return Rows(ids, turns, positions, torch.cat(places), targets)


def _optimizer(model: Vlm, stage: StageSection, decay: float) -> torch.optim.AdamW:
    """Matrices decay; norms, biases, places and the token embedding do not."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        words = name == "decoder.embed_tokens.weight"
        factor = stage.word_rate if words else stage.vision_rate if name.startswith("vision.") else 1.0
        plain = words or weight.ndim < 2 or name == "connector.places"
        groups.setdefault((factor, 0.0 if plain else decay), []).append(weight)
    rows = [{"params": found, "lr": stage.rate * factor, "weight_decay": wd} for (factor, wd), found in groups.items()]
    return torch.optim.AdamW(rows, betas=(0.9, 0.98), fused=model.device.type == "cuda")
