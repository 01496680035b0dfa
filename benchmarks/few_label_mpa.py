"""How many labels does a student need that also learns its parity gaps (MPA) to answer as well as one of labels alone?

    python -m benchmarks.few_label_mpa --words runs/talking-words --work runs/few-label

Beside benchmarks.few_label, whose plan and preparation it shares. For each smaller share of labelled concepts: the
first half of the steps on scenes of the pictures that keep their labels then; the student is asked about the scenes
that the teacher answered, but those that show a picture whose labels it may not see now; and the second half of the
steps is on the questions that the teacher answers as they are written and the student does not. The goal is what
labels alone reach with a tenth of the concepts and as many steps. What is left of the withheld labels: a withheld
picture's name may stand in a question about other pictures, as something that is not there.

Goes on where it was killed.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.few_label import LABELS, Mix, Plan, Prepared, pools, prepare, recipe_of, said_of, student_of
from benchmarks.results_folder import machine, write, write_text
from pocketvlm.distill.vlm.features import trunk_features, without_trunk
from pocketvlm.distill.vlm.kept_teacher import SHIPPED
from pocketvlm.distill.vlm.list_answers import list_answers
from pocketvlm.distill.vlm.mpa import kept_verdicts, parity_gaps
from pocketvlm.distill.vlm.pseudo import labelled_numbers, subset
from pocketvlm.distill.vlm.recipe import VlmRecipe
from pocketvlm.distill.vlm.scene_list import SceneList, composer_of
from pocketvlm.distill.vlm.stages import Source, StageRun
from pocketvlm.teachers.device import pick_device

_FEW = 11
_PLAN = Plan()


def half_of(plan: Plan, seed: int) -> VlmRecipe:
    """The control's recipe with half of its steps."""
    return recipe_of("labels", seed, dataclasses.replace(plan, steps=plan.steps // 2))


def run_share(
    share: float, seed: int, plan: Plan, made: Prepared, words: Path, work: Path, scenes: int
) -> dict[str, Any]:
    folder = work / f"mpa-{share:g}-s{seed}"
    path = folder / "said.json"
    if path.is_file():
        return said_of(path, plan)
    begun = time.monotonic()

    def say(line: Any) -> None:
        print(json.dumps({"share": share, "seconds": round(time.monotonic() - begun), "told": line}), flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    taught = made.sources.taught
    assert taught is not None, "the distilled arm has a teacher"
    assert taught.answers is not None, "and learns from its distributions"
    assert taught.features is not None, "the trunk stands still"
    device, tokens = made.start.device, made.start.tokenizer.json
    model = student_of(plan, words, tokens, seed, device)
    pictures, _ = pools(False)
    known = labelled_numbers(pictures, share)
    withheld = set(labelled_numbers(pictures, LABELS)) - set(known)
    few = subset(pictures, known)
    true = SceneList.draw(
        few, tokens, scenes=plan.labelled, seed=_FEW, questions=plan.questions, length=123, variants=3
    )  # fmt: skip
    kept = trunk_features(
        model, true, composer_of(few, model.config.vision.size, variants=3, device=device), work / "features",
        bfloat16=plan.bfloat16, say=say,
    )  # fmt: skip
    with without_trunk(model):
        StageRun(model, half_of(plan, seed), Source(true, kept), None, folder / "first", say=say).run(resume=True)
    verdicts = {(row.scene, row.question): row for row in kept_verdicts(taught.scenes, taught.answers)}
    allowed = [
        index for index, entry in enumerate(taught.scenes.entries) if not withheld & {n for _, n in entry.scene.placed}
    ][:scenes]
    chosen = set(allowed)
    asked, numbers = taught.scenes.only(lambda index, place: index in chosen)
    own = taught.features.only(numbers)
    with without_trunk(model):
        ours = list_answers(model, asked, own)
    teachers = [dataclasses.replace(row, answer=verdicts[numbers[row.scene], row.question].answer) for row in ours]
    gaps, places = parity_gaps(asked, teachers, ours)
    consistent = sum(bool(row.answer) for row in teachers)
    count = sum(len(entry.questions) for entry in gaps.entries)
    say({"asked": len(ours), "teacher_consistent": consistent, "gaps": count})
    with without_trunk(model):
        source = Source(gaps, own.only(places))
        StageRun(model, half_of(plan, seed), source, None, folder / "second", say=say).run(resume=True)
        answers = list_answers(model, made.test, made.test_seen)
    result = {
        "plan": dataclasses.asdict(plan), "share": share, "seed": seed, "labelled_pictures": len(known),
        "scenes": len(asked), "asked": len(ours),
        "teacher_consistent": consistent, "gaps": count, "seconds": round(time.monotonic() - begun, 1),
        "said": [row.answer for row in answers],
    }  # fmt: skip
    write_text(path, json.dumps(result) + "\n")
    return result


def main(
    teacher: str = SHIPPED,
    words: Path = Path("runs/talking-words"),
    work: Path = Path("runs/few-label"),
    shares: tuple[float, ...] = (0.05,),
    seeds: tuple[int, ...] = (0, 1, 2),
    scenes: int = 1000,
    plan: Plan = _PLAN,
    device: str = "auto",
    name: str = "few_label_mpa.json",
) -> None:
    """Run what is missing and write the result; the control's answers are those of benchmarks.few_label in --work."""
    torch.set_num_threads(1)
    made = prepare(plan, teacher, words, work, False, pick_device(device))
    mix = Mix(made.test)
    whole = torch.ones(1, mix.scenes).double().numpy()

    def told(said: list[str]) -> dict[str, float]:
        return dict(zip(Mix.names, (round(float(value), 2) for value in mix.values(said, whole)[0])))

    def control() -> list[dict[str, Any]]:
        found = []
        for seed in seeds:
            path = work / f"labels-s{seed}" / "said.json"
            if path.is_file():
                read = said_of(path, plan)
                found.append({"seed": seed, "share": LABELS, **told(read["said"])})
        return found

    rows = []
    for share in shares:
        for seed in seeds:
            found = run_share(share, seed, plan, made, words, work, scenes)
            rows.append(
                {key: value for key, value in found.items() if key not in ("said", "plan")} | told(found["said"])
            )
            write(name, {"plan": dataclasses.asdict(plan), "labels_only": control(), "mpa": rows, "machine": machine()})
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
