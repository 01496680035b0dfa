"""Does int8 cost the shipped files anything? Parity of every fold's student, pooled, because one fold cannot decide.

    python benchmarks/pooled_parity.py

Takes the student of protocol "few", arm distilled, seed 0, of each fold (trained if `protocols.py` has not left it in
--work), exports ONNX and ExecuTorch at fp32 and int8, records the reference on the fold's test pool, checks parity,
and pools the paired task changes over all queries. A fold that is done is repeated only if its student has changed.
Written to benchmarks/results/pooled_parity.json. About ten minutes on two cores once the students exist.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import protocols
import tyro
from results_folder import machine, write

from pocketvlm.data import open_data
from pocketvlm.edge.bundle import Bundle
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.parity import check_parity, pooled_task_bound
from pocketvlm.export.reference import record_reference

TARGETS = ("onnx:fp32", "onnx:int8", "executorch:fp32", "executorch:int8")
SEED = 0
# what a report says of how far a tower's rows are from the reference
SHOWN = ("one_minus_cosine_mean", "one_minus_cosine_p99", "one_minus_cosine_max", "sqnr_db")


def one_fold(fold: int, work: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(parity report as JSON, bytes of each variant) of a fold."""
    run = protocols.run_folder("few", "distilled", fold, SEED, work)
    if not (run / "report.html").is_file():
        protocols.run_one("few", "distilled", fold, SEED, work)
    bundle, reference, out = (run.with_name(f"{run.name}-{part}") for part in ("bundle", "reference", "parity"))
    if not (out / "parity.json").is_file():
        data = open_data(f"openmoji?pool=test&fold={fold}&flags=exclude")
        export_bundle(run, bundle, TARGETS, overwrite=True)
        record_reference(run, reference, data=data, overwrite=True)
        check_parity(bundle, reference, out=out)
    sizes = {
        f"{variant.target} {variant.precision}": sum(
            (bundle / name).stat().st_size for name in set(variant.files.values())
        )
        for variant in Bundle.load(bundle).variants
    }
    return json.loads((out / "parity.json").read_text(encoding="utf-8")), sizes


def numbers(reports: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Drift of each tower of one variant on real inputs: the mean of the folds' means, the worst fold of the rest."""
    found: dict[str, dict[str, list[float]]] = {}
    for report in reports:
        variant = next(v for v in report["variants"] if f"{v['target']} {v['precision']}" == name)
        stage = next(s for s in variant["stages"] if s["stage"] == ("S2" if variant["precision"] == "fp32" else "S3"))
        for tower in ("image", "text"):
            real = stage["details"].get(f"{tower}, real only", stage["details"][tower])
            for key in SHOWN:
                found.setdefault(tower, {}).setdefault(key, []).append(real[key])
    how = {"one_minus_cosine_mean": np.mean, "sqnr_db": min}
    return {
        tower: {key: float(f"{how.get(key, max)(values):.4g}") for key, values in rows.items()}
        for tower, rows in found.items()
    }


def main(work: Path = Path("runs/protocols"), folds: tuple[int, ...] = (0, 1, 2, 3, 4)) -> None:
    """Check what is missing, then pool."""
    work = work.resolve()
    pairs = [one_fold(fold, work) for fold in folds]
    reports, sizes = [report for report, _ in pairs], [size for _, size in pairs]
    variants = {}
    for row in pooled_task_bound(reports):
        name = f"{row.target} {row.precision}"
        if row.k != 5:
            continue
        entry = variants.setdefault(name, {"drift": numbers(reports, name), "R@5": {}})
        entry["R@5"][row.direction] = {
            "queries": row.change.queries, "lost": row.change.lost, "gained": row.change.gained,
            "loss_points": round(100 * row.change.loss, 2), "bound_points": round(100 * row.change.bound, 2),
            "status": row.status,
        }  # fmt: skip
        full = f"{row.target} fp32"
        entry["bytes"] = [size[name] for size in sizes]
        entry["of_fp32"] = round(max(size[name] / size[full] for size in sizes), 4)
    folds_status = {str(fold): report["status"] for fold, report in zip(folds, reports)}
    result = {"targets": TARGETS, "folds": folds_status, "variants": variants, "machine": machine()}
    print(json.dumps(variants, indent=1))
    print(write("pooled_parity.json", result))


if __name__ == "__main__":
    tyro.cli(main)
