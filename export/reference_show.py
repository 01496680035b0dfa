"""A recorded reference for people: what it holds, how it was made, how exact it is."""

from __future__ import annotations

from typing import Any

from pocketvlm.export.budgets import load_budgets
from pocketvlm.export.compare import target_ranks
from pocketvlm.export.reference_run import STATISTICS, ReferenceRun

FP16_MAX = 65504.0


def fp16_headroom(reference: ReferenceRun) -> dict[str, tuple[float, str]]:
    """tower -> (65504 / largest magnitude over all cases and taps, name of that tap)."""
    result = {}
    for tower, (names, values) in reference.taps.items():
        largest = values[:, :, STATISTICS.index("absmax")].max(axis=0)
        result[tower] = (float(FP16_MAX / max(largest.max(), 1e-30)), names[int(largest.argmax())])
    return result


def describe(reference: ReferenceRun) -> dict[str, Any]:
    """The same facts as plain JSON types."""
    manifest, task = reference.manifest, reference.task
    scores = task.image @ task.text.T
    ranks = target_ranks(scores, task.positives)
    tie = load_budgets().for_precision("fp32").tie_width(reference.noise)
    return {
        "model_id": manifest["model_id"],
        "sha256": reference.digest,
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "date": manifest["date"],
        "command": manifest["command"],
        "data": manifest["data"],
        "counts": manifest["counts"],
        "numerics": manifest["numerics"],
        "source": manifest.get("source", {}),
        "not_compared": reference.not_compared,
        "environment": manifest["environment"],
        "task": {f"R@{k}": float((ranks <= k).mean()) for k in (1, 5, 10)}
        | {"queries": len(ranks), "tie_width_fp32": tie},
        "noise": reference.noise,
        "fp16_headroom": {
            tower: {"factor": value, "tap": tap} for tower, (value, tap) in fp16_headroom(reference).items()
        },
    }


def show(reference: ReferenceRun) -> None:
    """Print a summary table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    facts, console = describe(reference), Console()
    numerics, machine = facts["numerics"], facts["environment"]
    about = Table("reference", facts["model_id"], title="Reference run", title_justify="left")
    if facts["source"].get("kind") == "upstream":
        packages = ", ".join(f"{name} {version}" for name, version in facts["source"]["packages"].items())
        about.add_row("forward", f"{facts['source']['module']}, {facts['source']['forward']} ({packages})")
    for stage, reason in facts["not_compared"].items():
        about.add_row(f"not compared: {stage}", reason)
    about.add_row(
        "arithmetic", f"{numerics['dtype']} on {machine['device_name']}, TF32 off, deterministic, math attention"
    )
    if numerics.get("narrower_operators"):
        about.add_row("in less than float64", ", ".join(numerics["narrower_operators"]))
    about.add_row(
        "made", f"{facts['date']} by torch {machine['torch']}, kit {machine['kit']}, commit {machine['commit']}"
    )
    about.add_row("command", facts["command"])
    about.add_row("data", f"{facts['data']['name']}; " + ", ".join(f"{v} {k}" for k, v in facts["counts"].items()))
    about.add_row("task", ", ".join(f"{k} {100 * facts['task'][k]:.1f} %" for k in ("R@1", "R@5", "R@10")))
    about.add_row(
        "fp16 headroom", ", ".join(f"{t} {v['factor']:.3g}x at {v['tap']}" for t, v in facts["fp16_headroom"].items())
    )
    about.add_row("size", f"{facts['bytes'] / 1e6:.2f} MB, sha256 {facts['sha256'][:16]}")
    console.print(about)
    noise = Table(
        "against itself",
        "image 1 - cos (max)",
        "text 1 - cos (max)",
        "score deviation (max)",
        title="Noise floor",
        title_justify="left",
    )
    for name, entry in facts["noise"].items():
        if "unavailable" in entry:
            noise.add_row(name, "not available", entry["unavailable"][:40], "")
            continue
        values = [entry[t]["one_minus_cosine_max"] for t in ("image", "text")] + [entry["scores"]["score_max_abs"]]
        noise.add_row(name, *("not finite" if v is None else f"{v:.2e}" for v in values))
    console.print(noise)
