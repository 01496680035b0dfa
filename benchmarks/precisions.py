"""What every precision of every target costs and saves, on one trained student.

    python -m benchmarks.precisions RUN_FOLDER

Exports the student of a run at every precision that a target writes and reads back what the bundle recorded: scheme,
size, cosine to the float model on calibration inputs that were held out, latency here. Core ML files do not run on
Linux: their cosine is that of their rounded weights in eager float32, and they have no latency. Targets run one after
the other; each replaces its own rows of benchmarks/results/precisions.json. Two to three minutes on two idle cores for
the student of the quick demo (`pocketvlm demo --quick` leaves its run in `openmoji`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.results_folder import machine, write
from pocketvlm.edge.bundle import Bundle
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.targets import get_target, list_targets

RESULT = Path(__file__).resolve().parent / "results" / "precisions.json"
_KEPT = ("scheme", "biases", "held_out_cosine_mean", "held_out_cosine_p1", "held_out_cases", "meets_floor")


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
    calibration_size: int = 128,
) -> None:
    """run: a run folder. targets: of onnx, executorch, coreml. calibration_size: a quarter of it judges."""
    torch.set_num_threads(1)
    for name in targets:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "bundle"
            wanted = [f"{name}:{precision}" for precision in get_target(name).precisions if precision != "mixed"]
            export_bundle(run, out, wanted, calibration_size=calibration_size, progress=print)
            opened = Bundle.load(out)
            done = {"student": opened.contract.name, "calibration": opened.raw["provenance"]["calibration"]}
            known = json.loads(RESULT.read_text()) if RESULT.is_file() else {"rows": []}
            kept = [row for row in known["rows"] if row["target"] != name]
            write(RESULT.name, done | {"machine": machine(), "rows": kept + rows_of(opened)})


if __name__ == "__main__":
    tyro.cli(main)
