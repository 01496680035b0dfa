"""What fine-tuning with fake quantization gives back of what 8 and 4 bits lose.

    python -m benchmarks.finetuned FOLDER:FOLD ...

FOLDER is the run of a student trained on the student pool of an OpenMoji fold. Its towers are quantized as an export
does it, without and with fine-tuning (`export.finetune`), from the same calibration sample; both files run on the test
pool of the fold, which neither has seen. For int8 the file is also held against the graph that was trained, one input
at a time. Seconds are of the processor, as the machine was shared. Results of several calls are kept together in
benchmarks/results/finetuned.json, by run.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks.results_folder import RESULTS, machine, write
from pocketvlm.data import open_data
from pocketvlm.edge.backends import open_backend
from pocketvlm.edge.preprocess import load_image
from pocketvlm.export.calibration import build_calibration
from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.finetune import Finetune, finetune_towers
from pocketvlm.export.source import open_source
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.base import Calibration, Towers, Variant
from pocketvlm.export.targets.onnx import Tower, prepared_tower, present_towers
from pocketvlm.export.tuned import trained

RESULT = "finetuned.json"
CALIBRATION = 256
# inputs that are run one at a time against the trained graph
AGREE = 48

Rows = dict[Tower, NDArray[Any]]


def recall(image: NDArray[Any], text: NDArray[Any], answers: list[str], k: int = 5) -> tuple[float, float]:
    """R@k from pictures to texts and back, in points; row i belongs to row i, and equal texts answer for each other."""
    right = np.array([[a == b for b in answers] for a in answers])
    near = image.astype(np.float64) @ text.astype(np.float64).T
    both = [
        float(np.take_along_axis(right, np.argsort(-table, axis=1, kind="stable")[:, :k], 1).any(1).mean()) * 100
        for table in (near, near.T)
    ]
    return round(both[0], 2), round(both[1], 2)


def test_pool(model: Any, fold: int) -> tuple[Rows, list[str]]:
    """Pixels and ids of the test pool, row by row, and the names behind the ids."""
    samples = [sample for sample in open_data(f"openmoji?pool=test&fold={fold}&flags=exclude") if sample.captions]
    names = [sample.captions[0].text for sample in samples]
    spec = model.towers.contract.image
    pixels = np.stack([load_image(sample.image.read(), spec) for sample in samples])
    return {"image": pixels, "text": model.tokenizer().encode(names)}, names


def run_files(folder: Path, variant: Variant, rows: Rows, count: int | None = None, batch: int = 1) -> Rows:
    """The variant's embeddings, one input at a time unless said otherwise."""
    backend = open_backend(variant.target, folder, variant)  # type: ignore[arg-type]
    runs = {"image": backend.run_image, "text": backend.run_text}
    return {
        tower: np.concatenate([runs[tower](found[i : i + batch]) for i in range(0, len(found[:count]), batch)])
        for tower, found in rows.items()
    }


def judged(found: Rows, exact: Rows, names: list[str]) -> dict[str, Any]:
    """Distance to the float student by tower, and R@5."""
    row: dict[str, Any] = {}
    for tower in found:
        f = fidelity(found[tower], exact[tower])
        row[tower] = {"1-cosine mean": float(f"{1 - f.mean:.4g}"), "p99": float(f"{1 - f.p1:.4g}")}
    row["R@5 image to text"], row["R@5 text to image"] = recall(found["image"], found["text"], names)
    return row


def agreement(towers: Towers, calibration: Calibration, rows: Rows, found: Rows) -> dict[str, Any]:
    """Worst and mean 1 - cosine of a file to the graph that was trained, and the weights and grids that it shares."""
    result = {}
    for tower, module in present_towers(towers):
        left = trained(prepared_tower(module, calibration, tower))
        assert left is not None
        f = fidelity(found[tower], run_module(left.fake_quantized(), rows[tower]))
        result[tower] = {"mean": float(f"{1 - f.mean:.3g}"), "worst": float(f"{1 - f.minimum:.3g}")}
    return result


def one(run: Path, fold: int, precision: str, target: str, settings: Finetune) -> dict[str, Any]:
    """One student at one precision on one target, without and with."""
    model = open_source(run)
    contract = model.towers.contract
    pool = open_data(f"openmoji?pool=student&fold={fold}")
    more = build_calibration(pool, contract, model.tokenizer(), size=settings.rows)
    calibration = Calibration(more.pixels[:CALIBRATION], more.ids[:CALIBRATION], more.description)
    rows, names = test_pool(model, fold)
    exact = {tower: run_module(module, rows[tower]) for tower, module in present_towers(model.towers)}
    row: dict[str, Any] = {
        "student": contract.name, "fold": fold, "target": target, "precision": precision,
        "learnt from": more.description, "test inputs": len(names),
        "float": dict(zip(("R@5 image to text", "R@5 text to image"), recall(exact["image"], exact["text"], names))),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("without", "with"):
            if name == "with":
                started = time.process_time()
                finetune_towers([(target, precision)], model.towers, calibration, settings, more, print)
                row["seconds"] = round(time.process_time() - started, 1)
            folder = Path(scratch) / name
            how: Any = {"precision": precision, "folder": folder, "calibration": calibration}
            variant = get_target(target).lower(model.towers, **how)
            found = run_files(folder, variant, rows)
            notes: Any = variant.notes
            row[name] = judged(found, exact, names) | {
                "scheme": {tower: notes[tower]["scheme"] for tower in found},
                "MB": round(sum((folder / file).stat().st_size for file in set(variant.files.values())) / 1e6, 2),
            }
            if name == "with":
                row["settings"] = {tower: notes[tower]["finetune"] for tower in found}
                if precision == "int8":
                    few = {tower: given[:AGREE] for tower, given in rows.items()}
                    row["file to trained graph, 1-cosine"] = agreement(
                        model.towers, calibration, few, {tower: given[:AGREE] for tower, given in found.items()}
                    )
            print(name, json.dumps(row[name]), flush=True)
    return row


def main(
    runs: tyro.conf.Positional[tuple[str, ...]],
    precisions: tuple[str, ...] = ("int8",),
    target: str = "onnx",
    steps: int = 200,
) -> None:
    """Measure each run and add it to what was measured before."""
    torch.set_num_threads(1)
    path = RESULTS / RESULT
    for given in runs:
        folder, _, fold = given.rpartition(":")
        for precision in precisions:
            row = one(Path(folder), int(fold), precision, target, Finetune(steps))
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}}
            facts["runs"][f"{row['student']} fold {fold} {target} {precision} {Path(folder).name}"] = row
            facts["machine"] = machine()
            print(write(RESULT, facts))


if __name__ == "__main__":
    tyro.cli(main)
