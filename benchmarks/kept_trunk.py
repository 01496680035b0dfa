"""What a training step of a generative student costs with its frozen trunk and without, in processor time.

    python -m benchmarks.kept_trunk --words runs/talking-words

One thread; processor seconds, which other work on the machine lengthens less than the clock; the best of several steps.
"pixels": the trunk sees the batch in every step. "kept": its outputs come from a file, which is the floor of a step as
long as connector and decoder are trained. Written to benchmarks/results/kept_trunk.json.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.few_label import Plan, student_of
from benchmarks.results_folder import machine, write
from pocketvlm.data.scenes import picture_set
from pocketvlm.distill.vlm.features import trunk_features, without_trunk
from pocketvlm.distill.vlm.recipe import WeightsSection
from pocketvlm.distill.vlm.scene_list import SceneList, composer_of
from pocketvlm.distill.vlm.stages import stage_terms
from pocketvlm.students.vlm import Vlm
from pocketvlm.students.vlm.model import Rows

_BATCH = 16


def seconds(model: Vlm, seen: Callable[[], Tensor], rows: Rows, bfloat16: bool, steps: int) -> float:
    """Least processor time of one step."""
    weights = [weight for name, weight in model.named_parameters() if not name.startswith("vision.")]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    found = []
    for _ in range(steps):
        begun = time.process_time()
        batch = seen()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = stage_terms(model, WeightsSection(), batch, rows, None)["answer"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        found.append(time.process_time() - begun)
    return min(found)


def main(words: Path = Path("runs/talking-words"), steps: int = 5) -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    tokens = (words / "tokenizer.json").read_bytes()
    pictures = picture_set("student", 0, limit=40)
    scenes = SceneList.draw(pictures, tokens, scenes=_BATCH, questions=8, seed=0)
    rows = []
    for layers, width in ((3, 96), (6, 192)):
        plan = dataclasses.replace(Plan(), layers=layers, width=width, connector=2 * width)
        model = student_of(plan, words, tokens, 0, torch.device("cpu"))
        composer = composer_of(pictures, model.config.vision.size)
        row: dict[str, Any] = {"layers": layers, "width": width, "batch": _BATCH}
        with tempfile.TemporaryDirectory() as folder:
            kept = trunk_features(model, scenes, composer, Path(folder))
            for bfloat16 in (False, True):
                batch, chosen = scenes.rows(range(_BATCH)), range(_BATCH)
                model.vision.eval()
                whole = seconds(model, partial(scenes.pixels, chosen, composer), batch, bfloat16, steps)
                with without_trunk(model):
                    bare = seconds(model, partial(kept, chosen), batch, bfloat16, steps)
                name = "bfloat16" if bfloat16 else "float32"
                row[name] = {
                    "pixels_ms": round(1000 * whole, 1),
                    "kept_ms": round(1000 * bare, 1),
                    "kept_steps_per_second": round(1 / bare, 2),
                    "ratio": round(whole / bare, 2),
                }
        rows.append(row)
        print(row, flush=True)
    print(write("kept_trunk.json", {"rows": rows, "machine": machine()}))


if __name__ == "__main__":
    tyro.cli(main)
