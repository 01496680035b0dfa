"""What a trained student can be quantized to, and whether the ranking of its blocks can be trusted.

    python -m benchmarks.pareto RUN_FOLDER --data 'openmoji?pool=student&fold=0'

Runs `pocketvlm quantize` and keeps its quantize.json in benchmarks/results, its plot in docs/images. Then each block is
quantized alone on two halves of other pictures: a measure of damage is worth ranking by where both halves agree
(Spearman). About five minutes of one core for lite0-minilm2.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from benchmarks.results_folder import RESULTS, write
from pocketvlm.data import open_data
from pocketvlm.export.calibration import DEFAULT_SIZE, build_calibration
from pocketvlm.export.compare import PairedChange, spearman_rows
from pocketvlm.export.quantize import Quantized, quantize
from pocketvlm.export.quantize_points import Judge, Point, parse_goal
from pocketvlm.export.quantize_report import JSON_FILE, PLOT, plot, table
from pocketvlm.export.sensitivity import Damage, measure_blocks
from pocketvlm.export.source import open_source
from pocketvlm.export.targets.onnx import prepared_tower
from pocketvlm.export.validation import Validation, build_validation

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
MEASURES = ("r5_loss", "margin_drop", "margin_noise", "one_minus_cosine")
_HALF = 128


def halves(validation: Validation) -> tuple[Validation, Validation]:
    """The first pictures with their captions, and as many of the last with theirs."""
    last = validation.positives[::-1]
    turned = Validation(validation.pixels[::-1].copy(), validation.ids, last, validation.description)
    return validation.first(_HALF), turned.first(_HALF)


def agreement(one: list[Damage], other: list[Damage]) -> dict[str, float]:
    """Spearman's correlation of each measure between two samples, over blocks."""
    found = {}
    for measure in MEASURES:
        values = [{damage.name: getattr(damage, measure) for damage in part} for part in (one, other)]
        a, b = (np.array([[part[name] for name in values[0]]], np.float64) for part in values)
        found[measure] = round(float(spearman_rows(a, b)[0]), 3)
    return found


def committed() -> Quantized:
    """What the committed quantize.json holds."""
    content = json.loads((RESULTS / JSON_FILE).read_text())
    points = {}
    for entry in content["points"]:
        taken = {key: value for key, value in entry.items() if key not in ("meets", "budget", "on_front", "changes")}
        taken["recall"] = {int(k[2:]): value for k, value in entry["recall"].items()}
        taken["changes"] = {int(k[2:]): PairedChange(**value) for k, value in entry["changes"].items()}
        taken["keep"] = {tower: tuple(blocks) for tower, blocks in entry["keep"].items()}
        points[entry["name"]] = Point(**taken)
    front = tuple(entry["name"] for entry in content["points"] if entry["on_front"])
    judge = Judge(parse_goal(content["budget"]), "by the one-sided" in content["judged"], content["judged"])
    return Quantized(
        content["student"], judge, tuple(points.values()), points.get(content["chosen"]), points[content["nearest"]],
        front, tuple(Damage(**entry) for entry in content["blocks"]), content,
    )  # fmt: skip


def main(
    run: Annotated[Path | None, tyro.conf.Positional] = None,
    data: str = "openmoji?pool=student&fold=0",
    budget: str = "r@5 -0.5",
    reliability: bool = True,
) -> None:
    """run: a run folder; left out: the committed result is drawn again. data: captioned pictures that it was trained
    on. reliability: compare two halves too."""
    torch.set_num_threads(1)
    if run is None:
        print(table(committed()))
        plot(committed(), [IMAGES / f"{PLOT}.png"])
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        found = quantize(run, out, budget=budget, data=data, progress=print)
        print(table(found))
        write(JSON_FILE, json.loads((out / JSON_FILE).read_text()))
        shutil.copy(out / f"{PLOT}.png", IMAGES / f"{PLOT}.png")
    if not reliability:
        return
    model, source = open_source(run), open_data(data)
    tokenizer = model.tokenizer()
    assert tokenizer is not None, "quantize has refused a single tower"
    calibration = build_calibration(source, model.towers.contract, tokenizer)
    validation = build_validation(source, model.towers.contract, tokenizer, calibration=DEFAULT_SIZE)
    ready = {
        "image": (model.towers.image, prepared_tower(model.towers.image, calibration, "image")),  # type: ignore[arg-type]
        "text": (model.towers.text, prepared_tower(model.towers.text, calibration, "text")),  # type: ignore[arg-type]
    }
    one, other = (measure_blocks(ready, half, print) for half in halves(validation))  # type: ignore[arg-type]
    result = {"pictures_of_each_half": _HALF, "blocks": len(one), "spearman": agreement(one, other)}
    print(json.dumps(result, indent=1))
    write("quantize_ranking.json", result, RESULTS)


if __name__ == "__main__":
    tyro.cli(main)
