"""What the talking teacher says of the scenes of recipe `openmoji-talking`, small enough to ship.

    python -m benchmarks.talking_answers --teacher runs/talking-teacher

Writes distill/vlm/kept: the teacher's tokenizer, what it calls the student pool's pictures that have no labels (fold
0), and the eight largest of its shares at each answer token. Its weights are 57 MB and are not shipped; with these two
megabytes `pocketvlm vlm distill --teacher openmoji-talking` and `pocketvlm demo --vlm` need neither them nor a GPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save

from pocketvlm.data.scenes import picture_set
from pocketvlm.distill.vlm.answer_cache import MANIFEST, kept_answers
from pocketvlm.distill.vlm.kept_teacher import SHIPPED, said_path
from pocketvlm.distill.vlm.pseudo import labelled_numbers, picture_answers
from pocketvlm.distill.vlm.recipe import load_vlm_recipe
from pocketvlm.distill.vlm.run import answers_folder, taught_list
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.students.vlm import load_vlm
from pocketvlm.students.vlm.io import TOKENIZER
from pocketvlm.teachers.files import sha256_file, write_atomic

KEPT = Path(__file__).resolve().parents[1] / "distill" / "vlm" / "kept"


def main(teacher: Path, work: Path = Path("runs/talking-answers")) -> None:
    """Let the teacher answer, drop what the recipe does not learn from, and write the folder anew."""
    recipe = load_vlm_recipe(SHIPPED)
    model = load_vlm(teacher).to(torch.bfloat16)
    pictures = picture_set("student", 0)
    known = labelled_numbers(pictures, recipe.data.captions)
    unlabelled = sorted(set(range(len(pictures))) - set(known))
    work.mkdir(parents=True, exist_ok=True)
    said = picture_answers(model, pictures, unlabelled, kept=work)
    taught = taught_list(recipe.data, pictures, known, said, model.tokenizer.json)
    name = answers_folder(taught)
    composer = composer_of(pictures, model.config.vision.size, variants=recipe.data.variants)
    kept_answers(work / name, taught, top=recipe.teacher.top, teacher=model, composer=composer, say=print)
    shutil.rmtree(KEPT, ignore_errors=True)
    shutil.copytree(work / name, KEPT / name)
    files = {}
    for path in sorted((KEPT / name).glob("*.safetensors")):
        write_atomic(path, save({key: value for key, value in load_file(path).items() if key != "relations"}))
        files[path.name] = sha256_file(path)
    write_atomic(KEPT / name / MANIFEST, json.dumps({"files": files}, indent=1).encode())
    (KEPT / TOKENIZER).write_bytes(model.tokenizer.json)
    path = said_path(work)
    assert path is not None, "one teacher answered"
    shutil.copy(path, KEPT / path.name)
    whole = sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file())
    print(f"{KEPT}: {len(taught)} scenes, {taught.tokens} answer tokens, {whole / 1e6:.1f} MB")


if __name__ == "__main__":
    tyro.cli(main)
