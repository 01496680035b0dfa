"""The minute student and pictures behind tests/fixtures/cuda_reference, whose reference run a GPU recorded.

    python benchmarks/cuda_reference.py

draws 64 pictures (colour, shape and size), trains a student of 0.15 M weights on their captions on the CPU, and writes
both into the fixture. Then, on a machine with CUDA,

    cd tests/fixtures/cuda_reference
    pocketvlm reference record student --data data/pictures.jsonl --device cuda --out run

makes the recording that tests/export/test_cuda_reference.py holds this machine's bundles to.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from pathlib import Path

import tyro
from PIL import Image, ImageDraw

from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.recipe import load_recipe

COLOURS = {
    "red": (220, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 220), "yellow": (230, 210, 30),
    "black": (10, 10, 10), "pink": (250, 120, 180), "brown": (120, 70, 30), "orange": (250, 140, 10),
}  # fmt: skip
SHAPES = ("circle", "square", "ring", "cross")
SIZES = {"small": 9, "large": 19}


def draw(colour: tuple[int, int, int], shape: str, radius: int) -> Image.Image:
    """48 x 48 RGB on a light ground."""
    image = Image.new("RGB", (48, 48), (240, 240, 235))
    pen, box = ImageDraw.Draw(image), (24 - radius, 24 - radius, 24 + radius, 24 + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=4)
    else:
        pen.line((box[0], box[1], box[2], box[3]), fill=colour, width=5)
        pen.line((box[0], box[3], box[2], box[1]), fill=colour, width=5)
    return image


def main(out: Path = Path("tests/fixtures/cuda_reference"), steps: int = 300) -> None:
    """Write `data` and `student` under `out`; a recorded run beside them no longer fits and is removed."""
    shutil.rmtree(out / "run", ignore_errors=True)
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = []
    for (name, colour), shape, (size, radius) in itertools.product(COLOURS.items(), SHAPES, SIZES.items()):
        file = f"{size}-{name}-{shape}.png"
        draw(colour, shape, radius).save(data / file, optimize=True)
        rows.append({"image": file, "caption": f"a {size} {name} {shape}", "label": shape})
    manifest = data / "pictures.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "cuda-reference",
        "data": {"train": f"{manifest}?check=none", "eval": f"{manifest}?check=none", "words": None},
        "views": {"count": 4},
        "student": {
            "name": "timm:test_efficientnet",
            "embed_dim": 32,
            "overrides": {
                "image": {"size": 48, "projection": {"norm": "batch"}},
                "text": {"layers": 2, "width": 32, "heads": 2, "context_length": 12, "vocab_size": 200},
            },
        },
        "objectives": [{"name": "clip"}],
        "train": {
            "device": "cpu", "precision": "fp32", "steps": steps, "batch_size": 32, "lr": 3e-3, "warmup_steps": 20,
            "ema_decay": 0.9, "threads": 1,
        },
        "checkpoint": {"every": steps},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        result = distill_run(load_recipe(recipe), Path(work) / "run", progress=False)
        shutil.rmtree(out / "student", ignore_errors=True)
        shutil.copytree(result.student, out / "student")
    assert result.evaluation is not None
    print(json.dumps(result.evaluation.values["model"]["image_to_text"]))


if __name__ == "__main__":
    tyro.cli(main)
