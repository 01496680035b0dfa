"""A trained run of every named student on every fold: what quantization is measured on.

    python -m benchmarks.named_students

Random weights quantize otherwise than trained ones, so the floors of int8 are read off these. `lite0-minilm2` is
trained by recipe `openmoji` as it ships. The others learn the teacher's space with all captions: `effnet-lite0` from
ImageNet weights, the rest from nothing on some 650 pictures, so that they know little of concepts that they have not
seen; what they recall is written beside every number that is made with them. Finished runs are kept in --work and made
again only if their recipe changed. An hour and a half on one core, vision transformers last.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from benchmarks.results_folder import recipe_digest
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.students.config import student_names

FOLDS = (0, 1, 2, 3, 4)
# from nothing: steps with pictures
STEPS = {"mnv4-035": 600, "mnv4-050": 500}
_OWN_TEXTS = ["tokenizer.source=texts", "student.fit_text_projection=null", "views.count=4"]
_FROM_NOTHING = [
    "student.fit_projection=null",
    "train.cut_after_block=null",
    "train.hold_statistics=[]",
    "train.lr_scale={}",
    "train.lr=1e-3",
    "train.text_pretrain_steps=200",
]


def recipe_of(student: str, fold: int) -> list[str]:
    """Changes to recipe `openmoji`."""
    captions = 0.1 if student == "lite0-minilm2" else 1.0
    changes = [
        f"data.train=openmoji?pool=student&fold={fold}&captions={captions}&flags=exclude",
        f"data.eval=openmoji?pool=test&fold={fold}&flags=exclude",
        f"teacher.spec=openmoji-lit?fold={fold}",
        "train.threads=1",
    ]
    if student == "lite0-minilm2":
        return changes
    changes += [f"student.name={student}", *_OWN_TEXTS]
    if student == "effnet-lite0":
        return [*changes, "train.lr=3e-4", "train.lr_scale={image_tower.trunk: 0, image_tower.projection: 0.03}"]
    return [*changes, *_FROM_NOTHING, f"train.steps={STEPS.get(student, 200)}"]


def train(student: str, fold: int, work: Path) -> Path:
    """The run's folder, trained unless it is there."""
    changes = recipe_of(student, fold)
    folder = work / f"{student}-f{fold}"
    stamp = folder.with_name(f"{folder.name}.recipe")
    digest = recipe_digest("openmoji", changes)
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == digest and (folder / "eval.json").is_file()):
        distill_run(load_recipe("openmoji", changes), folder, overwrite=True, progress=False)
        stamp.write_text(digest, encoding="utf-8")
        print(f"{student}, fold {fold}: trained", flush=True)
    return folder


def main(work: Path = Path("runs/named"), folds: tuple[int, ...] = FOLDS, students: tuple[str, ...] = ()) -> None:
    """Train what is missing, fold by fold."""
    for fold in folds:
        for student in students or ORDER:
            train(student, fold, work.resolve())


# the quick ones first
ORDER = ("effnet-lite0", "lite0-minilm2", "mnv4-035", "mnv4-050", "fastvit-t8", "repvit-m0.9", "vit-tiny")

if __name__ == "__main__":
    assert set(ORDER) == set(student_names())
    tyro.cli(main)
