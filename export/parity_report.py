"""A parity report for people: a terminal table and a self-contained HTML page."""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from pocketvlm.edge.errors import require
from pocketvlm.export.budgets import Check
from pocketvlm.export.parity import ParityReport, VariantReport
from pocketvlm.export.parity_depth import DEPARTS, TapDrift
from pocketvlm.export.parity_stages import JUDGED_AT, TITLES, metric_name, number

LIGHTS = {"pass": "●", "fail": "✕", "undecided": "◐", "not-compared": "○", "not-run": "–"}
WORDS = {
    "pass": "pass",
    "fail": "FAIL",
    "undecided": "undecided",
    "not-compared": "not compared",
    "not-run": "not run",
}
_COLORS = {
    "pass": "green",
    "fail": "bold red",
    "undecided": "yellow",
    "not-compared": "cyan",
    "not-run": "dim",
}
STAGES = ("S0", "S1", "S2", "S3", "S4", "S5")


def used(check: Check) -> float | None:
    """Share of the budget that is used up, in error units; None where the budget is zero or nothing was measured."""
    if check.value is None:
        return None
    if check.metric == "sqnr_db":
        return float(10 ** ((check.limit - check.value) / 20))
    if check.metric == "fp16_headroom":
        return check.limit / check.value
    value, limit = (check.value, check.limit) if check.better == "lower" else (1 - check.value, 1 - check.limit)
    return max(0.0, value / limit) if limit > 0 else None


def print_report(report: ParityReport, console: Any = None) -> None:
    """Print the verdict, one line per variant, and every stage that did not pass."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for stage in report.preflight:
        if stage.status == "fail":
            console.print(Text(f"✕ {stage.title}: {stage.message}", style="bold red"))
    if report.variants:
        table = Table(title=f"Parity of {report.model}", title_justify="left", padding=(0, 1, 0, 0), box=SIMPLE_HEAD)
        table.add_column("variant", no_wrap=True)
        for column in (*STAGES, "1-cos", "SQNR", "R@5"):
            table.add_column(column, justify="center" if column in STAGES else "right", min_width=2, no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for variant in report.variants:
            lights = {stage.stage: stage.status for stage in variant.stages}
            row: list[Any] = [variant.name]
            for name in STAGES:
                status = lights.get(name)
                row.append(Text(LIGHTS[status], style=_COLORS[status]) if status else "")
            row += [*_headline(variant), Text(WORDS[variant.status], style=_COLORS[variant.status])]
            table.add_row(*row)
        console.print(table)
        for variant in report.variants:
            if variant.status != "pass":
                console.print(
                    Text(f"{LIGHTS[variant.status]} {variant.name}: {variant.message}", _COLORS[variant.status])
                )
            if variant.not_modelled:
                console.print(Text(f"  {variant.name}: {variant.runtime} does not model {variant.not_modelled}", "dim"))
            for stage in (stage for stage in variant.stages if stage.stage == "predict"):
                line = f"{LIGHTS[stage.status]} {variant.name}, {stage.title}: {stage.message}"
                console.print(Text(line, _COLORS[stage.status]))
        for stage in report.variants[0].stages:
            if stage.status == "not-compared":
                console.print(
                    Text(f"{LIGHTS[stage.status]} {stage.stage}, every variant: {stage.message}", _COLORS[stage.status])
                )
    budgets = report.budgets
    console.print(Text(f"budgets: {budgets['file']} {budgets['version']} ({budgets['whose']})", style="dim"))
    console.print(Text(report.message, style=_COLORS[report.status]))


def _headline(variant: VariantReport) -> list[str]:
    """Worst tower's mean 1 - cosine and SQNR, and the picture-to-text recall before and after."""
    own = next((s for s in variant.stages if s.stage == ("S2" if variant.precision == "fp32" else "S3")), None)
    towers = [own.details[t] for t in ("image", "text") if "rows" in own.details.get(t, {})] if own else []
    cells = ["", ""]
    if towers and all(tower["non_finite"] == 0 for tower in towers):
        cells = [
            f"{max(t['one_minus_cosine_mean'] for t in towers):.1e}",
            f"{min(t['sqnr_db'] for t in towers):.1f}",
        ]
    elif towers:
        cells = ["NaN"] * 2
    task = next((s.details.get("image-to-text") for s in variant.stages if s.stage == "S5"), None)
    if not task:
        return [*cells, ""]
    before, after = task["recall_reference"]["5"], task["recall_candidate"]["5"]
    return [*cells, f"{100 * before:.1f}→{100 * after:.1f}"]


def render_html(report: ParityReport) -> str:
    """The whole report as one HTML page without outside references."""
    jinja2 = require("jinja2", "distill")
    text = resources.files("pocketvlm.export").joinpath("templates/parity.html").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        number=number, used=used, metric_name=metric_name, lights=LIGHTS, words=WORDS, titles=TITLES,
        stage_names=STAGES, judged_at=JUDGED_AT, drift_plot=drift_plot,
    )  # fmt: skip
    manifest = report.reference.get("manifest")
    return str(
        environment.from_string(text).render(
            report=report,
            manifest=manifest,
            facts=_facts(manifest) if manifest else [],
            noise=_noise_rows(report.reference.get("noise", {})),
            licences=_licences(report),
        )
    )


_WIDE, _HIGH, _LEFT, _TOP, _BELOW = 960, 230, 110, 14, 80
# nothing smaller is told apart from rounding
_LOWEST = 1e-9


def drift_plot(taps: list[TapDrift]) -> dict[str, Any]:
    """What the template draws: polylines, points and axis of one tower's drift over depth, in pixels.

    Reduced precision: 1 - cosine in all and the block's own. Full precision: deviation of the tap's statistics; a tap
    that was folded into another one has no value.
    """
    reduced = any(tap.total is not None for tap in taps)
    series = {"in all": [t.total for t in taps], "its own": [t.own for t in taps]}
    if not reduced:
        last = max((i for i, t in enumerate(taps) if t.deviation <= DEPARTS), default=-1)
        shown = [t.deviation <= DEPARTS or i > last for i, t in enumerate(taps)]
        series = {"deviation": [t.deviation if seen else None for t, seen in zip(taps, shown)]}
    values = [max(v, _LOWEST) for row in series.values() for v in row if v is not None and math.isfinite(v)]
    low = math.floor(math.log10(min(values, default=_LOWEST)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))
    step = (_WIDE - _LEFT - 20) / max(1, len(taps) - 1)

    def place(index: int, value: float) -> tuple[float, float]:
        share = (math.log10(max(value, _LOWEST)) - low) / (high - low)
        return round(_LEFT + index * step, 1), round(_TOP + (1 - share) * (_HIGH - _TOP), 1)

    lines, points = [], []
    for name, row in series.items():
        known = [(i, v) for i, v in enumerate(row) if v is not None and math.isfinite(v)]
        spots = [place(i, v) for i, v in known]
        lines.append((name, " ".join(f"{x},{y}" for x, y in spots)))
        marks = [taps[i].outlier and name != "in all" for i, _ in known]
        points += [
            (x, y, mark, name, f"{taps[i].tap}: {name} {v:.2e}") for (x, y), mark, (i, v) in zip(spots, marks, known)
        ]
    every = max(1, len(taps) // 24)
    labels = [(place(i, 10.0**low)[0], tap.tap) for i, tap in enumerate(taps) if i % every == 0]
    grid = [(place(0, 10.0**power)[1], f"1e{power}") for power in range(low, high + 1, max(1, (high - low) // 6))]
    return {
        "lines": lines, "points": points, "labels": labels, "grid": grid, "width": _WIDE, "height": _HIGH + _BELOW,
        "left": _LEFT, "floor": _HIGH, "reduced": reduced,
        "outliers": [tap.tap for tap in taps if tap.outlier],
        "folded": [] if reduced else [t.tap for t, v in zip(taps, series["deviation"]) if v is None],
    }  # fmt: skip


_OWN_LINE = ("dtype", "narrower_operators")


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    numerics, machine = manifest["numerics"], manifest["environment"]
    flags = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in numerics.items() if key not in _OWN_LINE)
    versions = ", ".join(
        f"{key} {machine[key]}" for key in ("torch", "cuda", "cudnn", "driver", "python") if machine[key]
    )
    source = manifest.get("source", {})
    return [
        ("model", manifest["model_id"]),
        *((f"recorded {key}", _flat(value)) for key, value in source.items()),
        ("arithmetic", f"{numerics['dtype']} on {machine['device_name']} ({machine['device']})"),
        ("flags", flags),
        *([("in less than float64", ", ".join(narrow))] if (narrow := numerics.get("narrower_operators")) else []),
        ("versions", f"{versions}, kit {machine['kit']}, commit {machine['commit'] or 'unknown'}"),
        ("processor", f"{machine['cpu']['model']} ({machine['cpu_capability']})"),
        ("data", f"{manifest['data']['name']}: " + ", ".join(f"{v} {k}" for k, v in manifest["counts"].items())),
        ("seeds", ", ".join(f"{key} {value}" for key, value in manifest["seeds"].items())),
        *((f"sha256 of {key}", value) for key, value in manifest["sha256"].items()),
        ("command", manifest["command"]),
        ("date", manifest["date"]),
    ]


def _flat(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


_NOISE_NAMES = {
    "rerun": "the same again",
    "float32": "float32 against float64",
    "batch": "batch of 1 against a full batch",
    "tf32": "TF32 factors",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def _noise_rows(noise: dict[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for key, name in _NOISE_NAMES.items():
        entry = noise.get(key)
        if entry is None:
            continue
        if "unavailable" in entry:
            rows.append((name, ["not available", "", "", ""]))
            continue
        cells = [number("", entry[tower]["one_minus_cosine_max"]) for tower in ("image", "text")]
        scores = entry["scores"]
        name += f" ({entry['made']})" if "made" in entry else ""
        rows.append((name, [*cells, number("", scores["score_max_abs"]), number("", scores["score_rms"])]))
    return rows


def _licences(report: ParityReport) -> list[tuple[str, str, str]]:
    """Whose pictures and weights the page shows; attribution has to travel with them."""
    manifest = report.reference.get("manifest") or {}
    rows = [tuple(row) for row in (*manifest.get("data", {}).get("licences", []), *manifest.get("licences", []))]
    rows += [(row["what"], row["licence"], row["attribution"]) for row in report.bundle.get("licences", [])]
    return list(dict.fromkeys(rows))  # type: ignore[arg-type]
