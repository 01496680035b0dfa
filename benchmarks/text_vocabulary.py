"""Many words in narrow rows, or few in wide ones? What the text student keeps of its teacher.

    python -m benchmarks.text_vocabulary

Trains only the text tower (recipe `openmoji-text`, towards `openmoji-lit`, no caption of the data set among its words)
with each token table, and scores teacher pictures x student texts on the *student* pool of each fold, not on its test
pool (as folds rotate, a student concept of one fold is a test concept of another). Written to
benchmarks/results/text_vocabulary.json. About ten minutes on two idle cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tyro

from benchmarks.results_folder import machine, write
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.students import load_student

# (pieces, width of a row)
TABLES = ((8000, 384), (8000, 128), (29000, 128))


def main(work: Path = Path("runs/text_vocabulary"), folds: tuple[int, ...] = (0, 1), seed: int = 0) -> None:
    """Train and score every table on every fold."""
    rows = []
    for pieces, width in TABLES:
        kept, teacher = [], []
        for fold in folds:
            changes = [
                f"data.train=openmoji?pool=student&fold={fold}&captions=0&flags=exclude&limit=16",
                f"data.eval=openmoji?pool=student&fold={fold}&flags=exclude",
                f"teacher.spec=openmoji-lit?fold={fold}",
                f"student.overrides.text.vocab_size={pieces}",
                f"student.overrides.text.embedding_width={width}",
                f"train.seed={seed}",
            ]
            folder = work.resolve() / f"{pieces}-{width}-f{fold}-s{seed}"
            result = distill_run(load_recipe("openmoji-text", changes), folder, overwrite=True, progress=False)
            assert result.evaluation is not None
            values = result.evaluation.values
            kept.append(100 * values["mixed"]["teacher_image_model_text"]["image_to_text"]["R@5"])
            teacher.append(100 * values["teacher"]["image_to_text"]["R@5"])
        tower = load_student(folder / "student").text_tower
        rows.append(
            {
                "pieces": pieces, "width": width,
                "text_parameters": sum(parameter.numel() for parameter in tower.parameters()),
                "teacher_R@5": round(float(np.mean(teacher)), 2),
                "teacher_image_student_text_R@5": round(float(np.mean(kept)), 2),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    print(write("text_vocabulary.json", {"folds": folds, "seed": seed, "tables": rows, "machine": machine()}))


if __name__ == "__main__":
    tyro.cli(main)
