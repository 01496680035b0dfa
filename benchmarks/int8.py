"""What quantization costs each named student, pooled over the folds: R@5, megabytes, milliseconds.

    python -m benchmarks.int8

Takes the runs of `benchmarks.named_students` (trained if they are not in --work), exports each at full precision, int8
and 4 bits, embeds the fold's test pictures and captions from the saved files in their own runtimes, and compares query
by query with the float32 file of the same runtime. One JSON file per student and fold under benchmarks/results/int8,
kept as long as the quantizers and the recipe are the same; a variant that it lacks is added. The pooled summary is
benchmarks/results/int8.json, and the table of docs/quantization.md is made of it. Milliseconds are processor time of
one thread at batch 1, each file in its turn; they and the speeds come from the first fold that has the variant, so that
one machine made them, whichever machines lent a hand with the other folds.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.held_out import HeldOut, changes, distance, held_out
from benchmarks.named_students import FOLDS, ORDER, recipe_of, train
from benchmarks.results_folder import RESULTS, machine, recipe_digest, write, write_between
from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import PocketvlmError
from pocketvlm.export.bench import WORKER
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.calibration import open_calibration
from pocketvlm.export.compare import paired_change
from pocketvlm.export.source import open_source
from pocketvlm.export.workers import Worker

# exported one by one, so that one that fails does not take the others with it
VARIANTS = ("onnx:fp32", "onnx:int8", "onnx:w4", "executorch:fp32", "executorch:int8", "executorch:w4")
RESULT = RESULTS / "int8"
ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "quantization.md", ROOT / "README.md"
_ROUNDS, _RUNS = 5, 10
_DECIDING = (
    *("prepare", "depthwise", "stems", "static", "equalize", "observers", "ranges"),
    *("rounding", "token_tables", "fidelity", "calibration"),
)
_OWN = {"onnx": ("onnx*",), "executorch": ("executorch", "executorch_writer", "xnnpack_quantizer")}


def quantizer_code(target: str, root: Path = ROOT) -> str:
    """Digest of what decides the bytes of a target's quantized files."""
    room = root / "export"
    own = [path for pattern in ("__init__", "base", *_OWN[target]) for path in room.glob(f"targets/{pattern}.py")]
    paths = [*own, *(room / f"{name}.py" for name in _DECIDING)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:8]


def lacking(variants: tuple[str, ...], there: dict[str, Any]) -> tuple[str, ...]:
    """What is not there yet, each with the float32 file of its runtime, beside which it is measured."""
    targets = {name.split(":")[0] for name in variants if name not in there}
    return tuple(name for name in variants if name not in there or name in {f"{t}:fp32" for t in targets})


def measure(run: Path, fold: int, variants: tuple[str, ...], work: Path) -> dict[str, Any]:
    """Every variant of one student on one fold: size, time, distance and what each query gained or lost."""
    pool = held_out(run, fold)
    bundle = work / f"{run.name}-bundle"
    # opened once, so that what every target prepares in the same way is prepared once
    model = open_source(run)
    data = f"openmoji?pool=student&fold={fold}"
    calibration, _ = open_calibration(data, model.towers.contract, model.tokenizer())
    rows: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    for name in variants:
        try:
            folders[name] = export_bundle(
                model, bundle / name.replace(":", "-"), (name,), calibration_data=calibration, overwrite=True
            )
        except PocketvlmError as error:
            rows[name] = {"failed": str(error)}
    workers: dict[str, dict[str, Worker]] = {}
    try:
        found: dict[str, dict[str, Any]] = {}
        for name, folder in folders.items():
            variant = Bundle.load(folder).variants[0]
            rows[name] = {
                "bytes": sum((folder / file).stat().st_size for file in set(variant.files.values())),
                "scheme": {t: (variant.notes.get(t) or {}).get("scheme") for t in variant.files},
                "meets_floor": {t: (variant.notes.get(t) or {}).get("meets_floor") for t in variant.files},
            }
            workers[name], found[name] = _start(folder, variant, pool, work)
        times = _times(workers)
    finally:
        for pair in workers.values():
            for worker in pair.values():
                worker.close()
    for name in folders:
        full = found[f"{name.split(':')[0]}:fp32"]
        before, after = pool.hits(full), pool.hits(found[name])
        rows[name] |= {
            "ms": times[name],
            "one_minus_cosine": {tower: distance(full[tower], found[name][tower]) for tower in full},
            "R@5": {direction: round(float(hit.mean()), 5) for direction, hit in after.items()},
            "changes": changes(before, after),
        }
    shutil.rmtree(bundle)
    return {"uids": pool.uids, "texts": pool.texts, "variants": rows}


def _start(folder: Path, variant: Any, pool: HeldOut, work: Path) -> tuple[dict[str, Worker], dict[str, Any]]:
    workers, found = {}, {}
    for tower, rows in pool.rows.items():
        file, out = work / f"rows-{tower}.npy", work / "embedded.npy"
        np.save(file, rows)
        request = {"folder": str(folder), "variant": asdict(variant), "tower": tower, "threads": 1, "rows": str(file)}
        workers[tower] = Worker(WORKER, request)
        workers[tower].ask({"do": "embed", "out": str(out)})
        found[tower] = np.load(out)
    return workers, found


def _times(workers: dict[str, dict[str, Worker]]) -> dict[str, dict[str, float]]:
    """Median over rounds of each round's median, in processor milliseconds."""
    rounds: dict[tuple[str, str], list[float]] = {}
    for _ in range(_ROUNDS):
        for name, pair in workers.items():
            for tower, worker in pair.items():
                answer = worker.ask({"do": "turn", "runs": _RUNS})
                rounds.setdefault((name, tower), []).append(statistics.median(answer["run_processor"]))
    return {
        name: {tower: round(statistics.median(rounds[name, tower]), 4) for tower in pair}
        for name, pair in workers.items()
    }


def summary(students: tuple[str, ...], folds: tuple[int, ...]) -> dict[str, Any]:
    """Pooled over the folds that are there: one row per student and variant."""
    table: dict[str, Any] = {}
    for student in students:
        parts = {fold: _read(student, fold) for fold in folds}
        there = {fold: part["variants"] for fold, part in parts.items() if part is not None}
        names = [name for name in VARIANTS if any(name in part for part in there.values())]
        rows = table.setdefault(student, {"folds": sorted(there), "variants": {}})["variants"]
        for name in names:
            good = [part[name] for part in there.values() if "failed" not in part.get(name, {"failed": ""})]
            full = f"{name.split(':')[0]}:fp32"
            failed = [part[name]["failed"] for part in there.values() if "failed" in part.get(name, {})]
            rows[name] = {"folds": len(good), **({"failed": failed[0]} if failed else {})}
            if not good:
                continue
            references = [part[full] for part in there.values() if "failed" not in part.get(name, {"failed": ""})]
            lost = {d: sum(row["changes"][d].count("-") for row in good) for d in good[0]["changes"]}
            gained = {d: sum(row["changes"][d].count("+") for row in good) for d in good[0]["changes"]}
            queries = {d: sum(len(row["changes"][d]) for row in good) for d in good[0]["changes"]}
            pooled = {d: paired_change(lost[d], gained[d], queries[d]) for d in lost}
            rows[name] |= {
                "megabytes": round(max(row["bytes"] for row in good) / 1e6, 2),
                "of_fp32": round(max(r["bytes"] / f["bytes"] for r, f in zip(good, references)), 4),
                "scheme": good[0]["scheme"],
                "ms": {tower: round(ms, 3) for tower, ms in good[0]["ms"].items()},
                "times_fp32": {t: round(references[0]["ms"][t] / ms, 3) for t, ms in good[0]["ms"].items()},
                "one_minus_cosine": {
                    t: round(float(np.mean([r["one_minus_cosine"][t]["mean"] for r in good])), 6) for t in good[0]["ms"]
                },
                "R@5": {d: round(100 * float(np.mean([r["R@5"][d] for r in good])), 2) for d in lost},
                "loss_points": {d: round(100 * change.loss, 2) for d, change in pooled.items()},
                "bound_points": {d: round(100 * change.bound, 2) for d, change in pooled.items()},
                "queries": queries,
                "pooled": _both(lost, gained, queries),
            }
    return table


def _both(lost: dict[str, int], gained: dict[str, int], queries: dict[str, int]) -> dict[str, Any]:
    """Both directions together. Their queries are different ones, though of the same pictures and captions."""
    change = paired_change(sum(lost.values()), sum(gained.values()), sum(queries.values()))
    return {
        "queries": sum(queries.values()),
        "loss_points": round(100 * change.loss, 2),
        "bound_points": round(100 * change.bound, 2),
    }


def markdown(table: dict[str, Any]) -> str:
    """One row per student, runtime and reduced precision that was measured."""
    lines = [
        "| student | runtime | precision | MB | of fp32 | faster, picture | faster, text | R@5, both | loss, points "
        "| bound | queries | folds |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for student, entry in table.items():
        for name, row in entry["variants"].items():
            target, precision = name.split(":")
            if precision == "fp32":
                continue
            if "megabytes" not in row:
                lines.append(f"| `{student}` | {target} | {precision} | {row['failed']} |" + " |" * 8)
                continue
            quicker = row["times_fp32"]
            lines.append(
                f"| `{student}` | {target} | {precision} | {row['megabytes']:.2f} | {row['of_fp32']:.3f} "
                f"| {quicker['image']:.2f} x | {quicker['text']:.2f} x | {np.mean(list(row['R@5'].values())):.1f} "
                f"| {row['pooled']['loss_points']:+.2f} | {row['pooled']['bound_points']:+.2f} "
                f"| {row['pooled']['queries']:,} | {row['folds']} |"
            )
    return "\n".join(lines) + "\n"


def short_markdown(table: dict[str, Any]) -> str:
    """int8 on onnxruntime alone, for the README."""
    lines = [
        "| student | MB | of fp32 | faster, picture / text | lost R@5, points (95 % bound) | queries |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for student, entry in table.items():
        row = entry["variants"]["onnx:int8"]
        quicker, pooled = row["times_fp32"], row["pooled"]
        lines.append(
            f"| `{student}` | {row['megabytes']:.1f} | {row['of_fp32']:.3f} | {quicker['image']:.1f} x / "
            f"{quicker['text']:.1f} x | {pooled['loss_points']:+.2f} ({pooled['bound_points']:+.2f}) "
            f"| {pooled['queries']:,} |"
        )
    return "\n".join(lines) + "\n"


def _read(student: str, fold: int) -> dict[str, Any] | None:
    path = RESULT / f"{student}-f{fold}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(
    work: Path = Path("runs/named"),
    folds: tuple[int, ...] = FOLDS,
    students: tuple[str, ...] = ORDER,
    variants: tuple[str, ...] = VARIANTS,
    summarize: bool = False,
) -> None:
    """Measure what is missing, then pool. summarize: only pool."""
    work = work.resolve()
    for fold in () if summarize else folds:
        for student in students:
            recipe = recipe_digest("openmoji", recipe_of(student, fold))
            stamps = {name: f"{recipe} {quantizer_code(name.split(':')[0])}" for name in variants}
            known = _read(student, fold)
            rows = known["variants"] if known is not None else {}
            there = {name: row for name, row in rows.items() if row["stamp"] == stamps.get(name, row["stamp"])}
            if missing := lacking(variants, there):
                run = train(student, fold, work)
                weights = hashlib.sha256((run / "student" / "weights.safetensors").read_bytes()).hexdigest()[:16]
                # another machine trains other weights; what it measured of them is not mixed with this
                if there and known is not None and known["weights"] != weights:
                    there, missing = {}, variants
                result = measure(run, fold, missing, work)
                measured = {name: {"stamp": stamps[name], **row} for name, row in result["variants"].items()}
                result["variants"] = there | measured
                facts = {"student": student, "fold": fold, "weights": weights, **result}
                facts["machine"] = machine()
                write(f"{student}-f{fold}.json", facts, RESULT)
                print(f"{student}, fold {fold}: measured", flush=True)
    table = summary(ORDER, FOLDS)
    print(write("int8.json", {"students": table, "machine": machine()}))
    write_between(PAGE, "int8", markdown(table))
    write_between(README, "students", short_markdown(table))


if __name__ == "__main__":
    tyro.cli(main)
