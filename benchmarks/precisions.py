"""What every precision of every target costs and saves, on one trained student.

    python -m benchmarks.precisions RUN_FOLDER

Exports the student of a run at every precision that a target writes and reads back what the bundle recorded: scheme,
size, cosine to the float model on calibration inputs that were held out, latency here. A precision whose export stops
is a row that says why. "ratio_to_fp32" is by four bytes a parameter. Core ML files do not run on Linux: their cosine is
that of their rounded weights in eager float32, and they have no latency. Each replaces its own rows
of benchmarks/results/precisions.json. Some minutes on two idle cores for the student of the quick demo
(`pocketvlm demo --quick` leaves its run in `openmoji`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.results_folder import machine, write
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import PocketvlmError
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.calibration import open_calibration
from pocketvlm.export.source import Source, open_source
from pocketvlm.export.targets import Calibration, get_target, list_targets

RESULT = Path(__file__).resolve().parent / "results" / "precisions.json"
_KEPT = (
    "scheme",
    "ranges",
    "equalised",
    "float_convolutions",
    "biases",
    "held_out_cosine_mean",
    "held_out_cosine_p1",
    "held_out_cases",
    "meets_floor",
)


def rows_of(bundle: Bundle) -> list[dict[str, Any]]:
    """One row per variant and tower: what was done, how large the variant is, how far from the float model."""
    rows = []
    for variant in bundle.variants:
        notes = variant.notes
        for tower in variant.files:
            of_tower = notes.get(tower) or {}
            rows.append(
                {"target": variant.target, "precision": variant.precision, "tower": tower}
                | {"MB_of_both_towers": round(notes["bytes"] / 1e6, 2), "ratio_to_fp32": notes["ratio_to_fp32"]}
                | {key: of_tower[key] for key in _KEPT if key in of_tower}
                | {"ms": (notes.get("latency_ms_batch1_1thread") or {}).get(tower)}
            )
    return rows


def main(
    run: Annotated[Path, tyro.conf.Positional],
    targets: tuple[str, ...] = tuple(list_targets()),
    precisions: tuple[str, ...] = (),
    calibration_size: int = 128,
) -> None:
    """run: a run folder. targets: of onnx, executorch, coreml. precisions: only these of what they write.
    calibration_size: a quarter of it judges."""
    torch.set_num_threads(1)
    model = open_source(run)
    trained_on = load_recipe(run / "recipe.yaml").data.train
    calibration, _ = open_calibration(trained_on, model.towers.contract, model.tokenizer(), size=calibration_size)
    assert calibration is not None, "a run was trained on something"
    for name in targets:
        for precision in get_target(name).precisions:
            if precision == "mixed" or (precisions and precision not in precisions):  # mixed wants a plan
                continue
            print(f"{name} {precision}", flush=True)
            rows = rows_or_refusal(model, name, precision, calibration)
            done = {"student": model.towers.contract.name, "calibration": calibration.description}
            known = json.loads(RESULT.read_text()) if RESULT.is_file() else {"rows": []}
            kept = [row for row in known["rows"] if (row["target"], row["precision"]) != (name, precision)]
            write(RESULT.name, done | {"machine": machine(), "rows": kept + rows})


def rows_or_refusal(model: Source, name: str, precision: str, calibration: Calibration) -> list[dict[str, Any]]:
    """The rows of one precision of one target; where its export stops, one row that says why."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bundle"
        try:
            export_bundle(model, out, [f"{name}:{precision}"], calibration_data=calibration)
        except PocketvlmError as error:
            return [{"target": name, "precision": precision, "refused": str(error)}]
        return rows_of(Bundle.load(out))


if __name__ == "__main__":
    tyro.cli(main)
