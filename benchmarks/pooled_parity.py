"""Does int8 cost the shipped files anything? Parity of every fold's students, pooled, because one fold cannot decide.

    python -m benchmarks.pooled_parity

Takes the students of protocol "few", arm distilled, of each fold and seed (trained if `protocols.py` has not left them
in --work), exports ONNX and ExecuTorch, records the reference on the fold's test pool, checks parity, and pools the
paired task changes over all answers; a query that several seeds answered is resampled as one. int8 is checked for every
seed, fp32 for the first. What is done is done again only if the student, the budgets or the export code changed.
Written to benchmarks/results/pooled_parity.json. A minute a student on two idle cores.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import protocols
from benchmarks.results_folder import machine, write
from pocketvlm.data import open_data
from pocketvlm.edge.bundle import Bundle
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.parity import check_parity, pooled_task_bound
from pocketvlm.export.reference import record_reference

INT8, FP32 = ("onnx:int8", "executorch:int8"), ("onnx:fp32", "executorch:fp32")
# what a report says of how far a tower's rows are from the reference
SHOWN = ("one_minus_cosine_mean", "one_minus_cosine_p99", "one_minus_cosine_max", "sqnr_db")


def export_code() -> str:
    """Digest of everything under export/, budgets included."""
    room = Path(__file__).resolve().parents[1] / "export"
    digest = hashlib.sha256()
    for path in sorted(path for path in room.rglob("*") if path.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(room)}|".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def check(fold: int, seed: int, targets: tuple[str, ...], work: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(parity report as JSON, bytes of each variant) of one student."""
    run = protocols.run_folder("few", "distilled", fold, seed, work)
    if not (run / "report.html").is_file():
        protocols.run_one("few", "distilled", fold, seed, work)
    bundle, reference, out = (
        run.with_name(f"{run.name}-{export_code()}-{part}") for part in ("bundle", "reference", "parity")
    )
    if not (out / "parity.json").is_file():
        data = open_data(f"openmoji?pool=test&fold={fold}&flags=exclude")
        export_bundle(run, bundle, targets, overwrite=True)
        record_reference(run, reference, data=data, overwrite=True)
        check_parity(bundle, reference, out=out)
        print(f"fold {fold}, seed {seed}: done", flush=True)
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


def pool(reports: list[dict[str, Any]], precision: str) -> dict[str, Any]:
    """Drift and R@5 of the variants of one precision over all reports."""
    chosen = [{**r, "variants": [v for v in r["variants"] if v["precision"] == precision]} for r in reports]
    found: dict[str, Any] = {}
    for row in pooled_task_bound(chosen):
        name = f"{row.target} {row.precision}"
        if row.k != 5:
            continue
        entry = found.setdefault(name, {"students": row.reports, "drift": numbers(chosen, name), "R@5": {}})
        entry["R@5"][row.direction.replace("-", "_")] = {
            "answers": row.change.queries, "queries": row.distinct,
            "lost": row.change.lost, "gained": row.change.gained,
            "loss_points": round(100 * row.change.loss, 2), "bound_points": round(100 * row.change.bound, 2),
            "method": row.method, "status": row.status,
        }  # fmt: skip
    return found


def main(
    work: Path = Path("runs/protocols"), folds: tuple[int, ...] = (0, 1, 2, 3, 4), seeds: tuple[int, ...] = (0, 1, 2)
) -> None:
    """Check what is missing, then pool."""
    work = work.resolve()
    pairs = {
        (seed, fold): check(fold, seed, (*FP32, *INT8) if seed == seeds[0] else INT8, work)
        for seed in seeds
        for fold in folds
    }
    first = [pairs[seeds[0], fold] for fold in folds]
    variants = pool([report for report, _ in first], "fp32") | pool([report for report, _ in pairs.values()], "int8")
    for name, entry in variants.items():
        full = f"{name.split()[0]} fp32"
        entry["of_fp32"] = round(max(sizes[name] / sizes[full] for _, sizes in first), 4)
        entry["megabytes"] = round(max(sizes[name] for _, sizes in first) / 1e6, 2)
    status = {f"fold {fold}, seed {seed}": report["status"] for (seed, fold), (report, _) in pairs.items()}
    print(json.dumps(variants, indent=1))
    facts = {"folds": folds, "seeds": seeds, "single_reports": status, "variants": variants, "machine": machine()}
    print(write("pooled_parity.json", facts))


if __name__ == "__main__":
    tyro.cli(main)
