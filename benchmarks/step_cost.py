"""What an objective, and a shipped recipe, adds to a training step: B = 256, teacher outputs from the cache.

    python -m benchmarks.step_cost

The step that all is compared with: forward of both towers of `mnv4-050` at 128 px over 256 pictures and 256 captions of
12 pieces, `clip`, backward, gradient clipping, AdamW, the moving average; it is timed as a whole. The towers cost the
same under every objective, so an objective is timed without them: forward, backward down to embeddings and features,
and the update of its own parameters, `clip + objective` and `clip` in turn; the difference of the medians over the step
is its share. What a definition asks of the towers besides (the momentum model's forward; the masked pictures' forward
and backward; the masked captions'; the cells' forward, and the map's head; a recipe's text-only batch, as many texts as
it has) is timed on its own and stated apart. The shares of some objectives (`CHECKED`) are checked by whole steps with
and without them, in turn; their spread over rounds is wider than most shares.

Inputs are random numbers of the built-in teacher's widths, and taps of this student's shapes (its last map; its words,
padded to the context as in a run, of which 12 are real) against 4 x 4 teacher tokens: time does not depend on what is
learned. What happens in the background while a step runs is not added: painting the masks, and reading 256 pairs of
teacher outputs from a cache on disk, whose time is stated. One thread and its CPU time, so that what else runs on the
machine counts little; wall time is given beside it. The result, benchmarks/results/step_cost.json, holds the machine
and its load; docs/objectives.md has the table. About four minutes on one core.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.results_folder import machine, write
from pocketvlm.data.wordlist import word_list
from pocketvlm.distill.fusion import masked_words
from pocketvlm.distill.masking import statistics_kept
from pocketvlm.distill.objectives import Outputs, Widths, build_objective, list_objectives, objective_needs
from pocketvlm.distill.objectives.masked_language import MaskedLanguage
from pocketvlm.distill.optim import Average
from pocketvlm.distill.recipe import Recipe, list_recipes, load_recipe
from pocketvlm.distill.regions import Cells, dense_map, frozen_copy, pooled, said_of
from pocketvlm.distill.taps import text_taps
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import build_student, train_tokenizer
from pocketvlm.teachers.precomputed import import_embeddings

BATCH, DIM, FEATURES, TOKENS, PIECES, SIZE = 256, 384, 768, 16, 12, 128
CLASSES = 16
# shapes of the student's taps: channels, height and width of its last map; context and width of its words
MAP, WORDS = (480, 4, 4), (24, 192)
EXITS = ("text.exit.1", "text.exit.2")
TAPPED = {"tokens": MAP[0], "text.tokens": WORDS[1], **dict.fromkeys(EXITS, DIM)}
WIDTHS = Widths(DIM, FEATURES, FEATURES, TAPPED, token_table=WORDS[1], text_blocks=3)
VOCABULARY, CELLS = 8000, 4
TEACHER = Widths(DIM, FEATURES, FEATURES, {"tokens": FEATURES})
MAPS = {"student_tap": "tokens", "teacher_tap": "tokens"}
STUDENT, ROUNDS, STEPS = "mnv4-050", 9, 5
CHECKED, CHECKS = ("crd", "rkd", "rankclip", "token-alignment"), 13
BESIDES = {
    "another_forward": "another forward",
    "masked_view": "masked view",
    "masked_text": "masked captions",
    "regions": "cells",
    "text_batch": "its texts",
}
FLOORS = {"objective": 0.05, "recipe": 0.15}


def in_turn(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each job; every round runs all of them once, after one unmeasured round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        for name, job in jobs.items():
            cpu, wall = time.process_time(), time.perf_counter()
            job()
            if round_:
                taken[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {"cpu_s": statistics.median(c for c, _ in found), "wall_s": statistics.median(w for _, w in found)}
        for name, found in taken.items()
    }


def outputs(seed: int, *, grad: bool, rows: int = BATCH, bank: int = BATCH) -> Outputs:
    """Random outputs of one model, every row captioned and no caption twice; the student's (`grad`) with its taps."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).requires_grad_(grad)

    found = Outputs(
        image=draw(rows, DIM),
        text=draw(rows, DIM),
        has_text=torch.ones(rows, dtype=torch.bool),
        logit_scale=torch.tensor(30.0, requires_grad=grad),
        image_features=draw(rows, FEATURES),
        text_features=draw(rows, FEATURES),
        bank=draw(bank, DIM),
        group=torch.arange(rows),
        class_logits=draw(rows, CLASSES),
    )
    if grad:
        found.taps = {"tokens": draw(rows, *MAP), "text.tokens": draw(rows, *WORDS)}
        found.text_mask, found.masked_image = real_words(rows), draw(rows, DIM)
        found.taps |= {name: draw(rows, DIM) for name in EXITS}
        found.masked_words, found.token_table = draw(rows, 4, FEATURES), draw(VOCABULARY, WORDS[1])
        found.regions, found.region_targets = draw(rows, CELLS, DIM), draw(rows, CELLS, DIM).detach()
        found.region_mask = torch.ones(rows, CELLS, dtype=torch.bool)
        # two masked pieces in captions of twelve, in as many slots as the context could fill
        found.masked_pieces = torch.where(torch.arange(4) < 2, torch.randint(VOCABULARY, (rows, 4), generator=g), -1)
        found.taught_logits, found.label = draw(rows, CLASSES), torch.arange(rows) % CLASSES
    else:
        found.taps = {"tokens": draw(rows, TOKENS, FEATURES)}
    return found


def real_words(rows: int) -> Tensor:
    """bool [rows, context], the first `PIECES` of each."""
    return (torch.arange(WORDS[0]) < PIECES).expand(rows, -1)


class Heads:
    """Objectives over given outputs: forward, backward down to the outputs, update of their own parameters."""

    def __init__(self, parts: Sequence[tuple[nn.Module, float, Outputs, Outputs]]) -> None:
        self.parts = parts
        own = [p for objective, *_ in parts for p in objective.parameters()]
        self.update = torch.optim.AdamW(own) if own else None

    def loss(self) -> Tensor:
        total = torch.zeros(())
        for objective, weight, student, teacher in self.parts:
            given = teacher if objective.needs.targets else None  # type: ignore[union-attr]
            total = total + weight * sum(objective(student=student, teacher=given).values())
        return total

    def __call__(self) -> None:
        for _, _, student, _ in self.parts:
            for leaf in (*vars(student).values(), *student.taps.values()):
                if isinstance(leaf, Tensor):
                    leaf.grad = None
        self.loss().backward()
        if self.update is not None:
            self.update.step()
            self.update.zero_grad(set_to_none=True)


def heads_of(*named: tuple[str, Mapping[str, Any]]) -> Heads:
    """Objectives over one batch of 256 pairs, in the middle of a run."""
    student, teacher, average = outputs(0, grad=True), outputs(1, grad=False), outputs(2, grad=False)
    parts = []
    for name, options in named:
        objective = build_objective(name, student=WIDTHS, teacher=TEACHER, **options)
        objective.at(5, 0.5)
        parts.append((objective, 1.0, student, average if objective.needs.momentum else teacher))
    return Heads(parts)


def heads_of_recipe(recipe: Recipe, texts: int) -> Heads:
    """A recipe's objectives: 256 pictures with captions, and `texts` texts in place of pictures where it has them."""
    bank = recipe.train.bank if isinstance(recipe.train.bank, int) else max(texts, 1)
    sides = {
        "pairs": [outputs(seed, grad=seed == 0, bank=bank) for seed in range(3)],
        "texts": [outputs(3 + seed, grad=seed == 0, rows=max(texts, 2)) for seed in range(3)],
    }
    if isinstance(recipe.train.bank, int):  # fixed texts in the teacher's embedding, the same for both models
        sides["pairs"][0].bank = sides["pairs"][1].bank
    parts = []
    count = 1 if recipe.teacher is None else len(recipe.teacher.specs)
    # several teachers share the width of one: their similarity matrices cost, not what they are made of
    theirs = dataclasses.replace(TEACHER, parts=((DIM // count, 20.0),) * count)
    for spec in recipe.objectives:
        objective = build_objective(spec.name, student=WIDTHS, teacher=theirs, **spec.options)
        objective.at(5, 0.5)
        student, teacher, average = sides[spec.batch]
        parts.append((objective, spec.weight or 1.0, student, average if objective.needs.momentum else teacher))
    return Heads(parts)


class Step:
    """A whole step of the towers with `clip` and perhaps another objective."""

    def __init__(self, student: Any, extra: str | None = None) -> None:
        self.student = copy.deepcopy(student).train()
        names = ["clip", *([extra] if extra else [])]
        self.objectives = nn.ModuleList(build_objective(n, student=self.widths(), teacher=TEACHER) for n in names)
        self.taps = ("tokens",) if any(o.needs.taps for o in self.objectives) else ()  # type: ignore[union-attr]
        self.parameters = [*self.student.parameters(), *self.objectives.parameters()]
        self.optimizer, self.average = torch.optim.AdamW(self.parameters, lr=1e-4), Average(self.student, 0.995)
        g = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), generator=g, dtype=torch.uint8)
        self.ids = torch.randint(
            4, self.student.text_tower.token.num_embeddings, (BATCH, PIECES), generator=g, dtype=torch.int32
        )
        self.original, self.crops = frozen_copy(self.student.image_tower), self.pixels.repeat(CELLS, 1, 1, 1)
        self.map = torch.randn(BATCH, *MAP, generator=g).requires_grad_()
        self.teacher = outputs(1, grad=False)
        blocks = len(self.student.text_tower.blocks)
        widths = dataclasses.replace(self.widths(), token_table=WORDS[1], text_blocks=blocks)
        self.fusion = cast(MaskedLanguage, build_objective("masked-language", student=widths))

    def widths(self) -> Widths:
        with torch.no_grad():
            pixels = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8)
            image = self.student.eval().encode_image(pixels, taps=("tokens",))
            text = self.student.encode_text(torch.ones(1, PIECES, dtype=torch.int32), taps=("tokens",))
        self.student.train()
        shapes = image.taps["tokens"].shape[1:], (self.student.text_spec.context_length, text.taps["tokens"].shape[2])
        assert shapes == (MAP, WORDS), f"the student's taps are {shapes}"
        return Widths(DIM, image.features.shape[-1], text.features.shape[-1], TAPPED)

    def __call__(self) -> None:
        image = self.student.encode_image(self.pixels, taps=self.taps)
        text = self.student.encode_text(self.ids, taps=self.taps)
        student = Outputs(
            image=image.embedding,
            text=text.embedding,
            has_text=torch.ones(BATCH, dtype=torch.bool),
            logit_scale=self.student.logit_scale,
            image_features=image.features,
            text_features=text.features,
            bank=text.embedding,
            group=torch.arange(BATCH),
            taps=image.taps | text_taps(text.taps, WORDS[0]),
            text_mask=real_words(BATCH),
        )
        loss = torch.zeros(())
        for objective in self.objectives:
            given = self.teacher if objective.needs.targets else None  # type: ignore[union-attr]
            loss = loss + sum(objective(student=student, teacher=given).values())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        self.student.clamp_logit_scale_()
        self.average.update(self.student)

    def momentum_forward(self) -> None:
        with torch.no_grad():
            self.average.module.encode_image(self.pixels)
            self.average.module.encode_text(self.ids)

    def masked_view(self) -> None:
        """As many pictures again through the image tower, forward and backward, running statistics kept."""
        with statistics_kept(self.student.image_tower):
            self.student.encode_image(self.pixels).embedding.square().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def masked_text(self) -> None:
        """As many captions again through the text tower with `masked-language`'s module in it, forward and backward."""
        places = torch.tensor([[3, 7, -1, -1]]).expand(BATCH, -1)
        words, _ = masked_words(self.student, self.fusion, self.ids, places, self.teacher.image)
        words.square().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def regions(self) -> None:
        """Four cells of each picture through the untrained tower, and the map's head, forward and backward."""
        said_of(self.original, self.crops)
        chart = dense_map(self.student, self.pixels, {"tokens": self.map}, None)
        boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], [0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0]])
        mask = torch.ones(BATCH, CELLS, dtype=torch.bool)
        pooled(chart, Cells(boxes.expand(BATCH, -1, -1), mask, self.crops)).square().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def texts(self) -> None:
        """As many texts again through the text tower, forward and backward."""
        self.student.encode_text(self.ids).embedding.square().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)


def cache_read_seconds() -> dict[str, float]:
    """256 pictures and captions out of 4,096 in a cache on disk."""
    g = np.random.Generator(np.random.PCG64(0))
    names, rows = [f"n{i}" for i in range(4096)], g.normal(size=(2, 4096, DIM)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        cache = import_embeddings(Path(folder) / "c", image=rows[0], uids=names, text=rows[1], texts=names)
        wanted = [names[i] for i in g.permutation(4096)[:BATCH]]
        return in_turn({"read": lambda: (cache.image(wanted), cache.text(wanted))}, ROUNDS)["read"]


def shares(jobs: Mapping[str, Callable[[], object]], step: float) -> dict[str, dict[str, float]]:
    """Each job over `clip` alone, as a share of the step; `clip` is timed between any two of them."""
    found = {}
    clip = heads_of(("clip", {}))
    for name, job in jobs.items():
        pair = in_turn({"clip": clip, "with": job}, ROUNDS)
        added = pair["with"]["cpu_s"] - pair["clip"]["cpu_s"]
        found[name] = {"added_ms": round(1e3 * added, 2), "share": round(added / step, 4)}
    return found


def recipe_shares(names: Sequence[str], step: float, apart: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The losses of each recipe over `clip` alone, and what it asks of the towers besides, as shares of the step."""
    found = {}
    for name in names:
        recipe = load_recipe(name)
        texts = recipe.train.text_batch
        found |= shares({name: heads_of_recipe(recipe, texts)}, step)
        row = found[name]
        if texts:
            row["text_batch"] = round(texts / BATCH * apart["texts"], 4)
        needs = [objective_needs(spec.name, spec.options) for spec in recipe.objectives]
        for key, asked in (
            ("another_forward", any(need.momentum for need in needs)),
            ("masked_view", any(need.masked_view for need in needs)),
            ("masked_text", any(need.masked_text for need in needs)),
            ("regions", any(need.regions for need in needs)),
        ):
            if asked:
                row[key] = apart[key]
    return found


def in_all(row: Mapping[str, float]) -> float:
    """The share of the losses and of what the towers do besides."""
    return row["share"] + sum(row.get(key, 0.0) for key in BESIDES)


def whole_steps(base: Step, other: Step) -> dict[str, Any]:
    """The share by whole steps in turn: the median of the differences of neighbours, and their quartiles."""
    found = []
    for _ in range(CHECKS + 1):
        taken = []
        for step in (base, other):
            began = time.process_time()
            step()
            taken.append(time.process_time() - began)
        found.append(taken[1] / taken[0] - 1)
    low, median, high = statistics.quantiles(found[1:], n=4)
    return {"whole_steps": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = train_tokenizer(word_list("wordfreq-en", size=20_000), 8000)
    student = build_student(
        STUDENT, embed_dim=DIM, tokenizer_json=tokenizer, seed=0, overrides={"image": {"size": SIZE}}
    )
    loads = [machine()["load_average"]]
    base = Step(student)
    besides = {
        "momentum_forward": base.momentum_forward, "masked_view": base.masked_view,
        "masked_text": base.masked_text,
        "regions": base.regions, "texts": base.texts,
    }  # fmt: skip
    whole = in_turn({"step": base, **besides}, STEPS)
    step = whole["step"]["cpu_s"]
    jobs: dict[str, Callable[[], object]] = {}
    refused = {}
    for name in list_objectives():
        try:
            jobs[name] = heads_of(("clip", {}), (name, {}))
            jobs[name]()
        except UsageError as error:
            refused[name] = str(error)
        if name == "hint":
            jobs["hint on maps"] = heads_of(("clip", {}), (name, MAPS))
            jobs["hint on all places"] = heads_of(("clip", {}), (name, {**MAPS, "places": 1}))
    objectives = shares(jobs, step)
    apart = {
        "another_forward": round(whole["momentum_forward"]["cpu_s"] / step, 4),
        "masked_view": round(whole["masked_view"]["cpu_s"] / step, 4),
        "masked_text": round(whole["masked_text"]["cpu_s"] / step, 4),
        "regions": round(whole["regions"]["cpu_s"] / step, 4),
    }
    objectives["momentum"]["another_forward"] = apart["another_forward"]
    objectives["masked-feature"]["masked_view"] = apart["masked_view"]
    objectives["masked-language"]["masked_text"] = apart["masked_text"]
    objectives["region-self"]["regions"] = apart["regions"]
    apart["texts"] = whole["texts"]["cpu_s"] / step
    recipes = recipe_shares([row["name"] for row in list_recipes()], step, apart)
    checks = {name: whole_steps(base, Step(student, name)) | {"apart": objectives[name]["share"]} for name in CHECKED}
    loads.append(machine()["load_average"])
    result = {
        "command": "python -m benchmarks.step_cost",
        "machine": machine(),
        "load_average_before_and_after": loads,
        "note": "other work ran on the machine; shares are of CPU time of one thread",
        "batch": BATCH, "student": f"{STUDENT} at {SIZE} px", "rounds": ROUNDS, "steps": STEPS, "floors": FLOORS,
        **whole, "cache_read": cache_read_seconds(),
        "objectives": objectives, "recipes": recipes, "whole_steps": checks, "not_timed": refused,
        "above_floor": {
            "objective": [name for name, row in objectives.items() if in_all(row) > FLOORS["objective"]],
            "recipe": [name for name, row in recipes.items() if in_all(row) > FLOORS["recipe"]],
        },
    }  # fmt: skip
    write("step_cost.json", result)
    print(table(result))


def table(result: Mapping[str, Any]) -> str:
    """The rows of docs/objectives.md, from a result."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    lines = ["| name | losses | towers besides |", "|---|---|---|"]
    for kind in ("objectives", "recipes"):
        for name, row in result[kind].items():
            besides = [f"{percent(row[key])} {what}" for key, what in BESIDES.items() if key in row]
            first, _, rest = name.partition(" ")
            shown = f"`{first}` {rest}".rstrip() if kind == "objectives" else f"recipe `{name}`"
            lines.append(f"| {shown} | {percent(row['share'])} | {', '.join(besides)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
