"""A run that needs nothing but this machine: noise as pictures, made-up captions, random embeddings as the teacher.

What is learned is worthless; seconds and bytes are those of a run of the same shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.data import open_data
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.stand_in import made_up_pictures
from pocketvlm.teachers.precomputed import import_embeddings

PIXELS, DIM, WORDS = 256, 384, 10
# the student whose towers are timed for distill/devices.json
STUDENT = "mnv4-050"
OVERRIDES = {"image.size": 128, "text.layers": 4, "text.width": 256, "text.context_length": 32}
# CLIP-KD's sum: what most recipes have, over a batch's similarities
OBJECTIVES = [{"name": "clip"}, {"name": "feature"}, {"name": "icl"}, {"name": "crd"}]


def make_inputs(work: Path, pictures: int) -> None:
    """JPEG files of 256 x 256 with a caption of ten words each, and unit vectors of 384 for both, under `work`."""
    made = made_up_pictures(pictures, captioned=0.0, size=PIXELS)
    words = sorted({str(sample.label) for sample in made.samples})
    rng = np.random.Generator(np.random.PCG64(1))
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = []
    for sample in made.samples:
        (data / f"{sample.uid}.jpg").write_bytes(sample.image.read())
        rows.append({"image": f"{sample.uid}.jpg", "caption": " ".join(rng.choice(words, WORDS))})
    (data / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = open_data(manifest(work))
    texts = source.captions()
    import_embeddings(
        work / "teacher", image=rng.standard_normal((len(source), DIM)), uids=[s.uid for s in source.samples],
        text=rng.standard_normal((len(texts), DIM)), texts=texts,
    )  # fmt: skip


def manifest(work: Path) -> str:
    """The spec of the pictures under `work`."""
    return f"{work / 'data' / 'pictures.jsonl'}?check=none"


def recipe(
    work: Path, *, student: str, overrides: Mapping[str, Any], batch: int, steps: int, device: str
) -> Recipe:  # fmt: skip
    """Trains `student` on what `make_inputs` left, without an evaluation or a checkpoint before the end."""
    value: dict[str, Any] = {
        "name": "made-up",
        "data": {"train": manifest(work), "eval": None, "words": None},
        "views": {"count": 1},
        "teacher": {"spec": f"embeddings:{work / 'teacher'}"},
        "student": {"name": student, "overrides": dict(overrides)},
        "tokenizer": {"source": "texts"},
        "objectives": OBJECTIVES,
        "train": {"device": device, "steps": steps, "batch_size": batch, "warmup_steps": 1, "log_every": 1},
        "checkpoint": {"every": steps},
    }
    return load_recipe(value)
